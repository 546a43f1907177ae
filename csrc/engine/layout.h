/* SPDX-License-Identifier: MIT */
/*
 * Follow changes of the owner's memory layout.  For the leader, with the gate closed.
 */
#ifndef UFFD_ENGINE_LAYOUT_H
#define UFFD_ENGINE_LAYOUT_H

#include "core.h"

static inline bool is_layout_event(const struct uffd_msg *message)
{
	return message->event && message->event != UFFD_EVENT_PAGEFAULT;
}

/* Erase it from the log: it was applied and reported to the keeper. */
static inline void erase_message(struct uffd_msg *message)
{
	__atomic_store_n(&message->event, 0, __ATOMIC_RELEASE);
}

void apply_layout_event(struct uffd_space *space, const struct uffd_msg *message);
/* Apply and erase the layout events among the first `count` messages of the log. */
void apply_log(struct uffd_space *space, size_t count);

#endif /* UFFD_ENGINE_LAYOUT_H */
