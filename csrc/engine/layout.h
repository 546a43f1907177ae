/* SPDX-License-Identifier: MIT */
/*
 * Following what the owner does to its memory.  For the leader, inside the closed gate.
 */
#ifndef UFFD_ENGINE_LAYOUT_H
#define UFFD_ENGINE_LAYOUT_H

#include "core.h"

static inline bool is_layout_event(const struct uffd_msg *message)
{
	return message->event && message->event != UFFD_EVENT_PAGEFAULT;
}

/* Out of the log: it has been applied, and the keeper knows. */
static inline void erase_message(struct uffd_msg *message)
{
	__atomic_store_n(&message->event, 0, __ATOMIC_RELEASE);
}

void apply_layout_event(struct uffd_space *space, const struct uffd_msg *message);
/* Apply the first `count` messages of the log and erase them, but for faults. */
void apply_log(struct uffd_space *space, size_t count);

#endif /* UFFD_ENGINE_LAYOUT_H */
