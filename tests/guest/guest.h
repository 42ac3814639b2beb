/* What the test guests share: being init, running each check in a child of its own, reporting one JSON object a line.
 *
 * A line for the host begins with "HULL ". The last one is {"done": NAME, "checks": N, "failed": N}; a guest that stops
 * without it has failed.
 */
#ifndef HULL_GUEST_H
#define HULL_GUEST_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <termios.h>
#include <unistd.h>

/* A check returns NULL, or what was wrong (static or from why()). */
typedef const char *(*check_fn)(void);

struct check {
	const char *name;
	check_fn run;
};

/* Formats what was wrong; appends errno when the format ends in a colon. */
const char *why(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Fails the check unless the expression holds. */
#define NEED(expression)                                                      \
	do {                                                                  \
		if (!(expression))                                            \
			return why("line %d: %s:", __LINE__, #expression);    \
	} while (0)

/* Is this process init? Then makes /proc, /sys, /dev, /tmp and a console usable. */
int become_init(void);
/* The value of NAME=value on the kernel command line, or NULL. */
const char *kernel_parameter(const char *name);
/* Writes a small text to a file: 0 or -1. */
int write_file(const char *path, const char *text);
/* Reads a small file; the text, or NULL. Static storage. */
const char *read_file(const char *path);
/* One line to the host. */
void report(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Runs the checks, each in a child killed after a minute (CHECK_SECONDS in the environment: another time, 0: none);
 * the number that failed.
 */
int run_checks(const struct check *checks, int count);
/* Reports the end; stops the machine if this is init, else returns the exit code. */
int finish(const char *name, int checks, int failed);
/* Nanoseconds of CLOCK_MONOTONIC. */
double now_ns(void);

#define COUNT(array) ((int)(sizeof(array) / sizeof((array)[0])))

#endif
