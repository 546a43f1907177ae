// SPDX-License-Identifier: MIT
/* A process whose first thread exits, at once or after SIGUSR1, while another continues. */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BYTES (1u << 20)

static void *work(void *first)
{
	static volatile unsigned long turns;
	char line[8], *area = aligned_alloc(4096, BYTES);

	memset(area, 7, BYTES);
	if (first)
		pthread_join(*(pthread_t *)first, NULL);
	printf("%p\n", (void *)area);
	fflush(stdout);
	/* Answer each line, so that a test sees that the process works. */
	while (fgets(line, sizeof(line), stdin)) {
		turns++;
		printf("%lu\n", turns);
		fflush(stdout);
	}
	exit(0);
}

int main(int count, char **words)
{
	static pthread_t first;
	pthread_t thread;
	sigset_t set;
	int number;

	(void)words;
	first = pthread_self();
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	pthread_sigmask(SIG_BLOCK, &set, NULL);
	pthread_create(&thread, NULL, work, count > 1 ? NULL : &first);
	if (count > 1)
		sigwait(&set, &number);
	pthread_exit(NULL);
}
