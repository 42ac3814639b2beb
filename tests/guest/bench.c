/* What the kernel costs a program: one JSON object with the best of several repetitions for each operation, in
 * nanoseconds. Runs as init or beside others; the host compares the same binary inside and outside.
 */
#include "guest.h"
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>

static const char *self;

/* Best of five batches of COUNT. */
#define MEASURE(name, count, ...)                                             \
	do {                                                                  \
		double best = 1e18;                                           \
		for (int batch = 0; batch < 5; batch++) {                     \
			double begin = now_ns(), each;                        \
			for (long i = 0; i < (count); i++) {                  \
				__VA_ARGS__;                                  \
			}                                                     \
			each = (now_ns() - begin) / (count);                  \
			if (each < best)                                      \
				best = each;                                  \
		}                                                             \
		report("{\"bench\":\"%s\",\"ns\":%.1f}", name, best);         \
	} while (0)

static void ignore(int number)
{
	(void)number;
}

static void *thread_body(void *argument)
{
	return argument;
}

static void exec_self(void)
{
	char *const arguments[] = { (char *)self, "nothing", NULL };

	execv(self, arguments);
	_exit(1);
}

static void reap(pid_t child)
{
	if (child > 0)
		waitpid(child, NULL, 0);
}

static void touch(char *memory, size_t size)
{
	for (size_t at = 0; at < size; at += 4096)
		memory[at] = 1;
}

static void *map(size_t size)
{
	return mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

/* Nanoseconds for each 4 KiB page of 16 MiB touched for the first time. */
static void anonymous_memory(void)
{
	const size_t size = 16 << 20, huge = 2 << 20;
	double best_small = 1e18, best_huge = 1e18;

	for (int batch = 0; batch < 5; batch++) {
		char *memory = map(size + huge), *aligned;
		double begin;

		aligned = (char *)(((uintptr_t)memory + huge - 1) & ~(huge - 1));
		madvise(aligned, size, MADV_NOHUGEPAGE);
		begin = now_ns();
		touch(aligned, size);
		if (now_ns() - begin < best_small)
			best_small = now_ns() - begin;
		munmap(memory, size + huge);

		memory = map(size + huge);
		aligned = (char *)(((uintptr_t)memory + huge - 1) & ~(huge - 1));
		madvise(aligned, size, MADV_HUGEPAGE);
		begin = now_ns();
		touch(aligned, size);
		if (now_ns() - begin < best_huge)
			best_huge = now_ns() - begin;
		munmap(memory, size + huge);
	}
	report("{\"bench\":\"anonymous_fault_4k\",\"ns\":%.1f}", best_small / (size >> 12));
	report("{\"bench\":\"anonymous_touch_huge_per_4k\",\"ns\":%.1f}", best_huge / (size >> 12));
}

/* Reading a mapped file already in the page cache: what exec of a dynamic binary does most of. */
static void file_memory(void)
{
	const size_t size = 4 << 20;
	int file = open("/tmp/hull-bench-file", O_RDWR | O_CREAT | O_TRUNC, 0600);
	char *content;

	if (file < 0)
		return;
	content = malloc(size);
	memset(content, 7, size);
	if (write(file, content, size) == (ssize_t)size) {
		volatile char sum = 0;

		MEASURE("file_map_and_read_4m", 1, {
			char *memory = mmap(NULL, size, PROT_READ, MAP_PRIVATE, file, 0);
			for (size_t at = 0; at < size; at += 4096)
				sum += memory[at];
			munmap(memory, size);
		});
	}
	free(content);
	close(file);
	unlink("/tmp/hull-bench-file");
}

static void ping_pong(void)
{
	int there[2], back[2];
	pid_t child;
	char byte = 0;

	if (pipe(there) || pipe(back))
		return;
	child = fork();
	if (child == 0) {
		close(there[1]);
		while (read(there[0], &byte, 1) == 1)
			(void)!write(back[1], &byte, 1);
		_exit(0);
	}
	close(there[0]);
	MEASURE("pipe_round_trip", 1000, (void)!write(there[1], &byte, 1); (void)!read(back[0], &byte, 1));
	close(there[1]);
	reap(child);
}

static long meminfo(const char *name)
{
	const char *text = read_file("/proc/meminfo");
	const char *at = text ? strstr(text, name) : NULL;

	return at ? strtol(at + strlen(name) + 1, NULL, 10) : -1;
}

int main(int count, char **arguments)
{
	int null, zero, is_init;
	static char buffer[65536];

	if (count > 1 && !strcmp(arguments[1], "nothing"))
		return 0;
	is_init = become_init();
	self = is_init ? "/init" : "/proc/self/exe";
	report("{\"memory\":{\"total_kib\":%ld,\"free_kib\":%ld,\"available_kib\":%ld,\"slab_kib\":%ld,\"percpu_kib\":%ld,\"cached_kib\":%ld}}",
	       meminfo("MemTotal:"), meminfo("MemFree:"), meminfo("MemAvailable:"), meminfo("Slab:"), meminfo("Percpu:"),
	       meminfo("Cached:"));

	MEASURE("getpid", 20000, syscall(SYS_getpid));
	MEASURE("clock_gettime_vdso", 100000, now_ns());
	MEASURE("clock_gettime_syscall", 10000, struct timespec t; syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &t));
	MEASURE("sched_getcpu", 20000, sched_getcpu());
	MEASURE("sched_yield", 5000, sched_yield());
	null = open("/dev/null", O_WRONLY);
	MEASURE("write_1b_dev_null", 5000, (void)!write(null, "x", 1));
	zero = open("/dev/zero", O_RDONLY);
	MEASURE("read_64k_dev_zero", 2000, (void)!read(zero, buffer, sizeof(buffer)));
	MEASURE("stat_root", 5000, struct stat s; stat("/", &s));
	MEASURE("open_close", 2000, close(open("/dev/null", O_RDONLY)));
	anonymous_memory();
	file_memory();
	MEASURE("mmap_touch_munmap", 500, char *page = map(4096); *page = 1; munmap(page, 4096));
	MEASURE("mprotect_pair", 500, static char *page; if (!page) { page = map(4096); *page = 1; } mprotect(page, 4096, PROT_READ);
		mprotect(page, 4096, PROT_READ | PROT_WRITE));
	signal(SIGUSR1, ignore);
	MEASURE("signal_self", 1000, kill(getpid(), SIGUSR1));
	MEASURE("futex_wake_nobody", 5000, int word = 0; syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0));
	MEASURE("fork_exit_wait", 100, pid_t child = fork(); if (!child) _exit(0); reap(child));
	MEASURE("vfork_exec_wait", 50, pid_t child = vfork(); if (!child) exec_self(); reap(child));
	MEASURE("fork_exec_wait", 50, pid_t child = fork(); if (!child) exec_self(); reap(child));
	ping_pong();
	MEASURE("pthread_create_join", 200, pthread_t thread; pthread_create(&thread, NULL, thread_body, NULL); pthread_join(thread, NULL));
	MEASURE("nanosleep_1us", 200, struct timespec t = { 0, 1000 }; nanosleep(&t, NULL));
	MEASURE("cpu_loop_10m", 1, volatile unsigned long sum = 0; for (long k = 0; k < 10000000; k++) sum += k);
	return finish("bench", 0, 0);
}
