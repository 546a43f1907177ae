/* SPDX-License-Identifier: MIT */
/*
 * Tell whether a thread of this process waits for the GIL, from /proc and without Python.  The
 * condition variable of the main interpreter's GIL is in a structure that CPython exports, so a
 * futex(2) in that structure is a wait for it.  Without such a structure, and in free-threaded
 * Python, no thread is found.
 */
#ifndef UFFD_GIL_H
#define UFFD_GIL_H

#include <stdbool.h>
#include <stdint.h>

struct uffd_gil_wait {
	int32_t thread_id;	/* 0: none */
	uint64_t cpu_ticks;	/* that it had used when it was first seen */
	uint64_t since_ns;	/* 0 if another thread was seen last time */
};

/* Call once, before the others. */
void uffd_gil_init(void);
/*
 * Look at a thread, or with 0 for any: the one noted if it still waits, else another one.  False,
 * and nothing is noted, if there is none.
 */
bool uffd_gil_look(struct uffd_gil_wait *wait, int32_t thread_id, uint64_t now);
/*
 * Whether the noted thread has done nothing but wait for the GIL between the looks: it used no
 * CPU, and waits there whenever one looks, for the 50 ms that this takes.
 */
bool uffd_gil_is_stuck(const struct uffd_gil_wait *wait);

#endif /* UFFD_GIL_H */
