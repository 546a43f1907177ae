/* SPDX-License-Identifier: MIT */
/*
 * Save the pages of another process as they were at one instant, while it runs.
 *
 * A thread reads the messages of a userfaultfd with synchronous write-protection.  Before the
 * instant it only notes which pages lost their protection; afterwards it saves a page before its
 * first write goes through, and sweeps over the others meanwhile.  It needs no Python.
 */
#ifndef UFFD_SNAPSHOT_SAVER_H
#define UFFD_SNAPSHOT_SAVER_H

#include <stdint.h>

#include "snapshot/answering.h"

int uffd_saver_create(const struct uffd_saver_options *options, struct uffd_saver **saver_ret);
/* Register ranges, or with `registers` 0 protect them. */
int uffd_saver_arm(struct uffd_saver *saver, const struct uffd_page_region *vec, uint64_t count,
		   uint32_t registers);
/* Protect the first page of ranges; returns those that are not registered. */
int uffd_saver_unregistered(struct uffd_saver *saver, const struct uffd_page_region *vec,
			    uint64_t count, struct uffd_page_ranges *ranges_ret);
/*
 * Ranges that lost their protection since the last call, and those of them that were dropped,
 * unmapped or moved, not written.  -errno of the saver.
 */
int uffd_saver_take_noted(struct uffd_saver *saver, struct uffd_page_ranges *ranges_ret,
			  struct uffd_page_ranges *changed_ret);
/*
 * Prepare for what will probably be owed: the process is then stopped for less time at the
 * instant.
 */
int uffd_saver_prepare(struct uffd_saver *saver, const struct uffd_image_piece *parts,
		       uint64_t parts_count, const struct uffd_page_region *pages, uint64_t count);
/* The instant, while the process is stopped: from now on the pages of the parts are owed. */
int uffd_saver_begin(struct uffd_saver *saver, const struct uffd_image_piece *parts,
		     uint64_t parts_count, const struct uffd_page_region *pages, uint64_t count);
/* Wait until nothing is owed, or for a time; 0: done, -EAGAIN: not yet, or its error. */
int uffd_saver_wait(struct uffd_saver *saver, uint64_t limit_ns);
void uffd_saver_stats(struct uffd_saver *saver, struct uffd_saver_stats *stats_ret);
/* Pages in a state of enum uffd_owed_state; call it when uffd_saver_wait() has returned 0. */
int uffd_saver_ranges(struct uffd_saver *saver, uint32_t state,
		      struct uffd_page_ranges *ranges_ret);
/* End it, and empty its place, which may be empty: nothing is protected any more. */
void uffd_saver_destroy(struct uffd_saver **saver);

#endif /* UFFD_SNAPSHOT_SAVER_H */
