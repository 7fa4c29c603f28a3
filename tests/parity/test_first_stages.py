"""First stages and their discriminator against stored outputs of latent-diffusion and taming-transformers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from carrara.codecs.kl import KLAutoencoder
from carrara.codecs.learned import Reconstruction
from carrara.codecs.quantiser import Quantiser, QuantiserParams
from carrara.interop import compvis, taming
from carrara.objectives import CodecLoss, CodecObjective
from carrara.objectives.adversarial import adaptive_weight, discriminator_loss
from carrara.process import Noise
from tests.parity.reference import Reference

# The bound: float32 against float32 of other kernels (the original itself moves by up to 8e-6).
TOLERANCE = 1e-5


class FirstStage(Reference):
    """A stored first stage; inputs and outputs stay float32."""

    def _wide(self, key: str) -> Tensor:
        return self.tensors[key]

    @property
    def weights(self) -> dict[str, Tensor]:
        return {k.removeprefix("weights."): v for k, v in self.tensors.items() if k.startswith("weights.")}

    def near(self, name: str, value: Tensor) -> None:
        assert value.shape == self.output(name).shape, name
        gap = float((value.detach() - self.output(name)).abs().max())
        assert gap <= TOLERANCE, f"{self.name} {name}: {gap}"


def test_kl_autoencoder() -> None:
    case = FirstStage("d2_autoencoder_kl")
    codec = compvis.load_autoencoder(case.weights, **case.config["kwargs"])
    assert isinstance(codec, KLAutoencoder)
    with torch.no_grad():
        q = codec.encode(case.input("x"))
        for name, value in {
            "mean": q.mean,
            "logvar": q.log_variance,
            "std": (q.log_variance / 2).exp(),
            "mode": q.mode(),
            "kl": q.kl_to_standard(),
            "sample": q.sample(case.input("noise")),
            "decode_mode": codec.decode(q.mode()),
            "decode_z": codec.decode(case.input("z")),
        }.items():
            case.near(name, value)
    # Hundreds of nats in float32.
    nll = -q.log_prob(case.input("z")).flatten(1).sum(1)
    torch.testing.assert_close(nll, case.output("nll_of_z"), rtol=1e-6, atol=0)


def test_vq_model() -> None:
    case = FirstStage("e1_vqmodel")
    codec = taming.load_vq(case.weights, **case.config["kwargs"])
    with torch.no_grad():
        codes = codec.encode(case.input("x"))
        assert torch.equal(codes.indices, case.output("indices"))
        case.near("h", codes.mode())
        case.near("quant", codes.vectors)
        case.near("codebook_entry", codec.codes(codes.indices).vectors)
        case.near("rec", codec.decode(codes))
        case.near("rec", codec.decode(codes.mode()))
        case.near("rec_from_given_indices", codec.decode(codec.codes(case.input("indices"))))
        loss = codec(case.input("x"), Noise(0)).penalty.mean()
        case.near("emb_loss", loss)


@pytest.mark.parametrize("form", ["v1", "v2_legacy", "v2_fixed"])
def test_quantiser_losses_and_gradients(form: str) -> None:
    case = FirstStage("e2_quantizer")
    beta, codes, channels = (case.config[key] for key in ("beta", "n_e", "e_dim"))
    legacy = form != "v2_fixed"
    quantiser = Quantiser(QuantiserParams(codes=codes, beta=beta, legacy=legacy, decay=None, restart=0.0), channels)
    (embedding,) = case.weights.values()
    with torch.no_grad():
        quantiser.codebook.copy_(embedding)
    z = case.input("z").requires_grad_()
    indices = quantiser.indices(z)
    vectors = quantiser.lookup(indices)
    loss = quantiser.loss(z, vectors)[0].mean()
    assert torch.equal(indices.flatten(), case.output(f"{form}.indices").flatten())
    case.near(f"{form}.loss", loss)
    of_z, of_codes = torch.autograd.grad(loss, (z, quantiser.codebook), retain_graph=True)
    case.near(f"{form}.loss_grad_z", of_z)
    case.near(f"{form}.loss_grad_embedding", of_codes)
    through = z + (vectors - z).detach()
    case.near(f"{form}.z_q", through)
    (straight,) = torch.autograd.grad((through * case.input("probe")).sum(), z)
    case.near(f"{form}.straight_through_grad_z", straight)


def test_discriminator() -> None:
    case = FirstStage("e3_discriminator")
    network = taming.load_discriminator(case.weights, **case.config["kwargs"])
    case.near("logits_eval", network.eval()(case.input("x")))
    case.near("logits_train", network.train()(case.input("x")))
    after = taming.discriminator_state_dict(network)
    for name in ("main.3.running_mean", "main.3.running_var", "main.6.running_mean", "main.6.running_var"):
        case.near(f"after_train.{name}", after[name])


def test_adversarial_losses_and_the_adaptive_weight() -> None:
    case = FirstStage("e4_gan_losses")
    real, fake = (case.input(name).flatten(1) for name in ("logits_real", "logits_fake"))
    case.near("hinge_d_loss", discriminator_loss(real, fake, "hinge").mean())
    case.near("vanilla_d_loss", discriminator_loss(real, fake, "logarithmic").mean())

    features, target = case.input("feat"), case.input("target")
    image = F.conv2d(features, case.input("last_layer"), padding=1).requires_grad_()
    error = (target - image).abs().flatten(1).mean(1)
    verdict = -(F.conv2d(image, case.input("disc_w")) ** 3).flatten(1).mean(1) * case.config["g_scale"]
    case.near("nll_loss", error.mean())
    case.near("g_loss", verdict.mean())
    gradients = [torch.autograd.grad(value.sum(), image)[0] for value in (error, verdict)]
    made = Reconstruction(image, features, features, error, None, {})
    case.near("d_weight", adaptive_weight(made, gradients[0], gradients[1]) * case.config["disc_weight"])


def test_the_adversarial_start() -> None:
    case = FirstStage("e4_gan_losses")
    loss = CodecLoss(adversarial=case.config["disc_weight"], start=case.config["threshold"])
    objective = CodecObjective(torch.nn.Identity(), loss, discriminator=torch.nn.Identity())
    seen = torch.tensor(case.config["steps"], dtype=torch.float64)
    case.near("adopt_weight", objective.fraction(seen) * loss.adversarial)


@pytest.mark.parametrize(("name", "module"), [("d2_autoencoder_kl", compvis), ("e1_vqmodel", taming)])
def test_the_way_back(name: str, module: object) -> None:
    case = FirstStage(name)
    load = compvis.load_autoencoder if module is compvis else taming.load_vq
    back = compvis.state_dict(load(case.weights, **case.config["kwargs"]))
    assert back.keys() == case.weights.keys()
    assert all(torch.equal(back[key], value) for key, value in case.weights.items())
