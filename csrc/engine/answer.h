/* SPDX-License-Identifier: MIT */
/* A worker's answer to a request. */
#ifndef UFFD_ENGINE_ANSWER_H
#define UFFD_ENGINE_ANSWER_H

#include "core.h"

/* `data` holds `request->length` bytes.  -ECANCELED: too late. */
int uffd_engine_complete(struct uffd_engine *engine, struct uffd_request *request,
			 const void *data);
/* The same; `data` has been faulted in. */
int answer_request(struct uffd_engine *engine, struct uffd_request *request, const void *data);
/*
 * Instead of failing several pages for one without content, request fewer: a fault's
 * own page alone, populate's in halves.  Returns 1, or 0 if that is not possible.
 */
int uffd_engine_ask_again(struct uffd_engine *engine, struct uffd_request *request);
int uffd_engine_fail(struct uffd_engine *engine, struct uffd_request *request, int32_t error);
/* Give up pages of [offset, end) that still wait; FAILED_NOTHING poisons them all. */
void give_up_pages(struct uffd_engine *engine, const struct uffd_request *request,
		   uint64_t offset, uint64_t end, int error, enum uffd_failure_stage stage);
/* Make its pages that still wait absent again, so that a new fault asks for them. */
void return_pages(struct uffd_engine *engine, const struct uffd_request *request);

#endif /* UFFD_ENGINE_ANSWER_H */
