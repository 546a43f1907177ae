"""The process driver: the engine and its Python sources in processes of their own.

`_remote` is what a `Handler` calls, over the connection of `_link` to a helper that `_start`
starts. There `_keeper` keeps the book and forks `_worker`, which runs the engine. They talk as
`_wire` says; `_transport` carries page sources, and `_clean` leaves the program's doings behind.
"""
