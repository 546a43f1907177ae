// SPDX-License-Identifier: MIT
/*
 * A program that is tracked and attached to: tracked mappings COUNT PAGES, tracked spin FILE.
 *
 * mappings: COUNT mappings of PAGES pages, each filled, with an unmapped page between any two.  A
 * line of standard input with a number N makes it write every N-th page; it answers with a line.
 * spin: a thread in user space that looks at the clock all the time.  FILE has the longest time
 * between two looks in nanoseconds, which may be set to 0 there, and the number of looks, both as
 * 64-bit numbers.
 *
 * First it prints where an instruction "syscall; ret" is in its code.
 */
#include "bench.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

void syscall_ret(void);

__asm__(".text\n"
	".globl syscall_ret\n"
	"syscall_ret:\n"
	"	syscall\n"
	"	ret\n");

static void say_where(void)
{
	printf("%lu\n", (unsigned long)(uintptr_t)syscall_ret);
	fflush(stdout);
}

static void mappings(uint64_t count, uint64_t pages)
{
	uint64_t step = (pages + 1) * SMALL_PAGE;
	char line[64];
	int fd;
	uint8_t *start = map_memory(ANON, count * step, &fd);

	for (uint64_t i = 0; i < count; i++) {
		memset(start + i * step, 1, pages * SMALL_PAGE);
		if (munmap(start + i * step + pages * SMALL_PAGE, SMALL_PAGE))
			die("munmap");
	}
	say_where();
	while (fgets(line, sizeof(line), stdin)) {
		uint64_t every = strtoull(line, NULL, 10);

		for (uint64_t page = 0; every && page < count * pages; page += every)
			*(volatile uint8_t *)(start + page / pages * step +
					      page % pages * SMALL_PAGE) = 2;
		printf("written\n");
		fflush(stdout);
	}
}

static _Noreturn void spin(const char *path)
{
	int fd = open(path, O_RDWR | O_CLOEXEC);
	_Atomic uint64_t *seen;
	uint64_t last;

	if (fd < 0)
		die("%s", path);
	seen = mmap(NULL, 2 * sizeof(*seen), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (seen == MAP_FAILED)
		die("mmap of %s", path);
	say_where();
	for (last = now_ns();;) {
		uint64_t now = now_ns();

		if (now - last > seen[0])
			seen[0] = now - last;
		last = now;
		seen[1]++;
	}
}

int main(int argc, char **argv)
{
	if (argc == 4 && !strcmp(argv[1], "mappings"))
		mappings(strtoull(argv[2], NULL, 10), strtoull(argv[3], NULL, 10));
	else if (argc == 3 && !strcmp(argv[1], "spin"))
		spin(argv[2]);
	else
		die("usage: tracked mappings COUNT PAGES | tracked spin FILE");
	return 0;
}
