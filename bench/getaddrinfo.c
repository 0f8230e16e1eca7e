//go:build ignore

/* getaddrinfo(3) again and again, as the C library that this is linked with has it. Each
 * line of input is a time in nanoseconds and a name; each line of output what came of it
 * (outcome of worker.go). */
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#define SAMPLES 1000000

static unsigned samples[SAMPLES];

static long long now(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int compare(const void *a, const void *b)
{
	unsigned x = *(const unsigned *)a, y = *(const unsigned *)b;

	return (x > y) - (x < y);
}

/* quantile by the nearest rank, as that of worker.go. */
static unsigned quantile(int n, double q)
{
	int rank = (int)(q * n + 0.9999999);

	if (n == 0)
		return 0;
	return samples[(rank < 1 ? 1 : rank > n ? n : rank) - 1];
}

static int look_up(const char *name)
{
	struct addrinfo hints = { 0 }, *found = NULL;
	int error;

	hints.ai_socktype = SOCK_STREAM;
	error = getaddrinfo(name, "443", &hints, &found);
	if (error == 0)
		freeaddrinfo(found);
	return error;
}

static void measure(long long span, const char *name)
{
	long long cpu = now(CLOCK_PROCESS_CPUTIME_ID), begun = now(CLOCK_MONOTONIC), before = begun;
	int count = 0, errors = 0, first = 0;

	while (before - begun < span && count < SAMPLES) {
		int error = look_up(name);
		long long after = now(CLOCK_MONOTONIC);

		if (error == 0)
			samples[count++] = after - before;
		else if (errors++ == 0)
			first = error;
		before = after;
	}
	cpu = now(CLOCK_PROCESS_CPUTIME_ID) - cpu;
	qsort(samples, count, sizeof(samples[0]), compare);
	printf("{\"count\":%d,\"errors\":%d,\"first_error\":\"%s\",\"p50\":%u,\"p99\":%u,\"cpu\":%lld,\"took\":%lld}\n",
	       count, errors, errors ? gai_strerror(first) : "", quantile(count, 0.5), quantile(count, 0.99), cpu,
	       before - begun);
	fflush(stdout);
}

int main(void)
{
	char name[256];
	long long span;

	memset(samples, 0, sizeof(samples)); /* or the first touch of each page is measured */
	puts("{}");                          /* says: ready */
	fflush(stdout);
	while (scanf("%lld %255s", &span, name) == 2)
		measure(span, name);
	return 0;
}
