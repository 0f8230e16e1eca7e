/* Looks names up, one on each line, as the C library does that it is linked with, and prints
 * the addresses of each on a line. */
#include <netdb.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

int main(void)
{
	char name[256], text[64];

	while (fgets(name, sizeof(name), stdin)) {
		struct addrinfo hints = { .ai_socktype = SOCK_STREAM }, *found = NULL, *one;

		name[strcspn(name, "\n")] = 0;
		if (getaddrinfo(name, NULL, &hints, &found) != 0)
			found = NULL;
		for (one = found; one; one = one->ai_next)
			if (!getnameinfo(one->ai_addr, one->ai_addrlen, text, sizeof(text), NULL, 0, NI_NUMERICHOST))
				printf("%s ", text);
		printf("\n");
		if (found)
			freeaddrinfo(found);
	}
	return 0;
}
