"""The process driver: the engine and its Python sources in helper processes (layer L4).

A `Handler` calls `_remote`, which uses the connection of `_link` to the keeper process, which
`_start` starts. The keeper (`_keeper`) forks the worker process (`_worker`), which runs the engine
and its workers, and keeps a `_book` for that process's successor. `_calls` lists the calls, `_wire`
has their format, `_transport` carries page sources, and `_clean` resets the signals.
"""
