/* lookups COUNT PAUSE WAIT NAME=ADDRESS,ADDRESS...
 *
 * Looks the names up in turn, both families at once, as the C library does that this is
 * linked with, PAUSE microseconds after one another, until it has done so COUNT times and
 * its input has ended, or ENOUGH have failed. A name without addresses must not exist. Says
 * what is otherwise, and at the end: lookups, how many failed, how many took WAIT
 * milliseconds or more, and how many milliseconds the longest took. */
#include <netdb.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

/* What glibc says of a name without addresses: its EAI_NODATA, which is no standard's. */
enum { NO_ADDRESSES = -5 };

enum { ENOUGH = 5 };

static long now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* in says whether an address is in a list with commas between. */
static int in(const char *list, const char *address)
{
	size_t n = strlen(address);

	for (; list; list = strchr(list, ','), list = list ? list + 1 : NULL)
		if (!strncmp(list, address, n) && (list[n] == ',' || list[n] == 0))
			return 1;
	return 0;
}

/* look returns how many addresses of the list a name has, or -1 if it has others; text is
 * what was found. */
static int look(const char *name, const char *list, char *text, size_t room)
{
	struct addrinfo hints = { .ai_socktype = SOCK_STREAM }, *found = NULL, *one;
	char address[64];
	int n = 0, error = getaddrinfo(name, NULL, &hints, &found);

	snprintf(text, room, error ? " %s" : "%s", error ? gai_strerror(error) : "");
	if (error)
		return error == EAI_NONAME || error == NO_ADDRESSES ? 0 : -1;
	for (one = found; one; one = one->ai_next) {
		getnameinfo(one->ai_addr, one->ai_addrlen, address, sizeof(address), NULL, 0, NI_NUMERICHOST);
		snprintf(text + strlen(text), room - strlen(text), " %s", address);
		n = n >= 0 && in(list, address) ? n + 1 : -1;
	}
	freeaddrinfo(found);
	return n;
}

static int is_input_over(void)
{
	struct pollfd input = { .fd = 0, .events = POLLIN };
	char byte;

	return poll(&input, 1, 0) > 0 && read(0, &byte, 1) == 0;
}

int main(int count, char **words)
{
	long least = atol(words[1]), pause = atol(words[2]), wait = atol(words[3]), lookups = 0, failed = 0, waits = 0,
	     longest = 0;
	int first = 4, over = 0;

	for (; failed < ENOUGH && (lookups < least || !over); lookups++) {
		char name[256], found[1024];
		const char *list, *comma;
		int n, want = 0;
		long took = now();

		snprintf(name, sizeof(name), "%s", words[first + lookups % (count - first)]);
		list = strchr(name, '=') + 1;
		name[list - name - 1] = 0;
		for (comma = *list ? list : NULL; comma; comma = strchr(comma + 1, ','))
			want++;
		n = look(name, list, found, sizeof(found));
		took = now() - took;
		longest = took > longest ? took : longest;
		waits += took >= wait;
		if (n != want && ++failed)
			printf("%s is%s after %ld ms, not %s\n", name, found, took, list);
		over = over || is_input_over();
		usleep(pause);
	}
	printf("%ld %ld %ld %ld\n", lookups, failed, waits, longest);
	return 0;
}
