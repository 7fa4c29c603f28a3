"""Property tests of this room: no deadline, since the first example pays for warming up."""

from hypothesis import settings

settings.register_profile("process", deadline=None)
settings.load_profile("process")
