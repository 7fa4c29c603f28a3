"""What a user can do, apart from how they ask for it: one request and one generator of events for each use case.

`request -> Iterator[Event]`. The generator does all the work: it refuses first, then loads, computes, saves. Closing
it cancels. Nothing in here prints, parses words of the command line or ends the program, so that the command line, a
server and a studio are three faces of the same code.

A new use case is one module: a `Request` (frozen, unknown fields refused), and a function that takes it and yields
events. Work that reports its progress through a callback becomes a generator by `stream.streamed`.
"""
