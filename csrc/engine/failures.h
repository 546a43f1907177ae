/* SPDX-License-Identifier: MIT */
/* What failed, written without a lock; pages that failed and were mended later do not count. */
#ifndef UFFD_ENGINE_FAILURES_H
#define UFFD_ENGINE_FAILURES_H

#include "core.h"

/* Note a failure that nothing mends. */
void note_failure(struct uffd_engine *engine, uint64_t address, uint64_t length, int error,
		  enum uffd_failure_stage stage);
/* Note a page that may be filled, or saved, after all. */
void note_failed_page(struct uffd_range *range, uint64_t page, int error,
		      enum uffd_failure_stage stage);
/* The same by the page's offset in a range of a space, as a request knows it. */
void note_failed_offset(struct uffd_engine *engine, const struct uffd_request *request,
			uint64_t offset, int error, enum uffd_failure_stage stage);
/* Before pages [offset, end) are taken out: which of those that failed are mended. */
void settle_failures(struct uffd_range *range, uint64_t offset, uint64_t end);
/* The failed pages of [offset, end) of a range that are not mended. */
uint64_t count_failed(struct uffd_range *range, uint64_t offset, uint64_t end);

/* The first failure that was not mended, and the number of them; a count of 0: none. */
void uffd_engine_failure(struct uffd_engine *engine, struct uffd_failure *failure_ret);

#endif /* UFFD_ENGINE_FAILURES_H */
