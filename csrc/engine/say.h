/* SPDX-License-Identifier: MIT */
/* Write a line about a failure, before its page is lost.  Async-signal-safe. */
#ifndef UFFD_ENGINE_SAY_H
#define UFFD_ENGINE_SAY_H

#include "core.h"

void say_page_fails(struct uffd_range *range, uint64_t page, int error,
		    enum uffd_failure_stage stage);
void say_engine_fails(struct uffd_engine *engine, uint64_t address, int error,
		      enum uffd_failure_stage stage, const char *consequence);
/* A read failed for lack of descriptors or memory and is retried; one line until it succeeds. */
void say_read_is_put_off(struct uffd_space *space, int error);
/* For a stand-in: the helper process has ended. */
void say_helper_ended(struct uffd_engine *engine);

#endif /* UFFD_ENGINE_SAY_H */
