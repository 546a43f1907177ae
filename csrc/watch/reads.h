/* SPDX-License-Identifier: MIT */
/* Count the reads of each userfaultfd, so that its watch sees whether somebody reads it. */
#ifndef UFFD_READS_H
#define UFFD_READS_H

#include <stdint.h>

/* Descriptors may share a counter. */
uint32_t uffd_reads_of(int fd);
/* The thread of this process that read it last; 0: unknown. */
int32_t uffd_reads_reader(int fd);
/* Messages have been read, by this thread. */
void uffd_reads_note(int fd);
/* read(2), and note the read. */
int64_t uffd_reads_read(int fd, void *buffer, uint64_t size);

#endif /* UFFD_READS_H */
