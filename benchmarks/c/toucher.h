/* SPDX-License-Identifier: MIT */
/*
 * The faulting threads of every latency and throughput benchmark. The bare C programs link
 * this file and the harness loads it as a shared library, so that both members of a pair
 * time the same instructions.
 */
#ifndef TOUCHER_H
#define TOUCHER_H

#include <stdint.h>

/* Seed of the page order that the fault benchmarks use on both sides. */
#define TOUCH_SEED 0x9e3779b97f4a7c15u

struct touch_job {
	uint8_t *base;		/* address of page 0 */
	const uint32_t *order;	/* page indexes in the order they are touched */
	uint64_t *ns;		/* out: latency of each touch; NULL: do not time them */
	uint64_t count;		/* number of touches */
	uint64_t page_size;
	uint64_t pause_ns;	/* sleep before each touch; 0: none */
	int32_t write;		/* 0: read one byte, 1: write one byte */
	int32_t cpu;		/* CPU to run on, -1: any */
	uint64_t cpu_ns;	/* out: CPU time of the thread */
};

/* A permutation of 0..count-1 (seed != 0), or 0..count-1 in order (seed == 0). */
void touch_order(uint32_t *order, uint64_t count, uint64_t seed);

/*
 * Run each job in a thread of its own, all released at once. *wall_ns_ret is the time from the first
 * touch to the end of the last one. Returns 0 or -errno.
 */
int touch_run(struct touch_job *jobs, uint32_t njobs, uint64_t *wall_ns_ret);

#endif
