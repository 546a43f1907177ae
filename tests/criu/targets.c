// SPDX-License-Identifier: MIT
/*
 * A process to be dumped and restored: targets READY MIB [changes].
 *
 * It fills MIB with unique numbers, makes the file READY, and waits.  After SIGUSR1 it checks the
 * numbers; with "changes" it does so after a fork, and after it has dropped, unmapped and moved
 * some pages.  Exit status 0: all is right; then, without "changes", READY is removed.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8 };

static volatile sig_atomic_t asked;
static uint64_t nonce;

static void on_signal(int number)
{
	(void)number;
	asked = 1;
}

static uint64_t expected(uint64_t index)
{
	return (index + 1) * 0x9e3779b97f4a7c15u ^ nonce;
}

static void fill(uint64_t *memory, uint64_t words)
{
	for (uint64_t i = 0; i < words; i++)
		memory[i] = expected(i);
}

/* Whether memory[0] and the following words are those from `first` on. */
static int is_right(const uint64_t *memory, uint64_t first, uint64_t words)
{
	/* Check scattered words first, so that the accesses are not sequential. */
	for (uint64_t i = 0; i < words / WORDS; i++) {
		uint64_t page = i * 7919 % (words / WORDS);

		if (memory[page * WORDS] != expected(first + page * WORDS))
			return 0;
	}
	for (uint64_t i = 0; i < words; i++)
		if (memory[i] != expected(first + i))
			return 0;
	return 1;
}

static int are_zeros(const uint64_t *memory, uint64_t words)
{
	for (uint64_t i = 0; i < words; i += WORDS)
		if (memory[i])
			return 0;
	return 1;
}

static int check_changes(uint64_t *memory, uint64_t words)
{
	uint64_t part = words / 4;
	pid_t child = fork();
	int status;
	void *place, *moved;

	if (child == 0)
		_exit(!is_right(memory, 0, words));
	if (madvise(memory, part * 8, MADV_DONTNEED))
		return 10;
	if (munmap(memory + part, part * 8))
		return 11;
	place = mmap(NULL, part * 8, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	moved = mremap(memory + 2 * part, part * 8, part * 8, MREMAP_MAYMOVE | MREMAP_FIXED, place);
	if (moved == MAP_FAILED)
		return 12;
	if (!are_zeros(memory, part))
		return 13;
	if (!is_right(moved, 2 * part, part))
		return 14;
	if (!is_right(memory + 3 * part, 3 * part, part))
		return 15;
	if (waitpid(child, &status, 0) != child || status)
		return 16;
	return 0;
}

int main(int argc, char **argv)
{
	uint64_t size, words, *memory;
	sigset_t blocked, old;

	if (argc < 3)
		return 2;
	size = strtoull(argv[2], NULL, 10) << 20;
	words = size / 8;
	/* Reserve twice as much; the second half stays empty. */
	memory = mmap(NULL, 2 * size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED || getrandom(&nonce, sizeof(nonce), 0) != sizeof(nonce))
		return 3;
	fill(memory, words);
	signal(SIGUSR1, on_signal);
	sigemptyset(&blocked);
	sigaddset(&blocked, SIGUSR1);
	sigprocmask(SIG_BLOCK, &blocked, &old);
	close(open(argv[1], O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
	while (!asked)
		sigsuspend(&old);
	if (!are_zeros(memory + words, words))
		return 4;
	if (argc > 3 && !strcmp(argv[3], "changes"))
		return check_changes(memory, words);
	if (!is_right(memory, 0, words))
		return 5;
	/* Removing the file tells processes that are not our parent. */
	return unlink(argv[1]) ? 6 : 0;
}
