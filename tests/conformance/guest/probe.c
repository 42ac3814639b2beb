/* What a container's process sees, as JSON lines: the other half of the conformance tests.
 *
 * `probe OPERATION [ARGUMENT]... [OPERATION ...]`: every operation prints one line, an object with the member "op" and, where
 * a system call decides, "errno" (0 if it succeeded). Static, so that it runs in an empty root filesystem.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

static void text(const char *bytes, size_t length)
{
	putchar('"');
	for (size_t i = 0; i < length; i++) {
		unsigned char c = bytes[i];
		if (c == '"' || c == '\\')
			printf("\\%c", c);
		else if (c < 0x20 || c == 0x7f)
			printf("\\u%04x", c);
		else
			putchar(c);
	}
	putchar('"');
}

static void string(const char *s)
{
	text(s, strlen(s));
}

static void member(const char *name)
{
	printf(",\"%s\":", name);
}

static void number(const char *name, long long value)
{
	member(name);
	printf("%lld", value);
}

static void unsigned_number(const char *name, unsigned long long value)
{
	member(name);
	printf("%llu", value);
}

static void begin(const char *op)
{
	printf("{\"op\":");
	string(op);
}

static void end(void)
{
	printf("}\n");
	fflush(stdout);
}

/* Reads a file whole (up to 256 KiB); -1 with errno. */
static long slurp(const char *path, char **content)
{
	static char buffer[256 * 1024];
	size_t have = 0;
	int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	if (fd < 0)
		return -1;
	while (have < sizeof(buffer)) {
		ssize_t got = read(fd, buffer + have, sizeof(buffer) - have);
		if (got < 0) {
			int saved = errno;
			close(fd);
			errno = saved;
			return -1;
		}
		if (got == 0)
			break;
		have += got;
	}
	close(fd);
	*content = buffer;
	return (long)have;
}

static void file_member(const char *name, const char *path)
{
	char *content;
	long length = slurp(path, &content);
	member(name);
	if (length < 0)
		printf("null");
	else
		text(content, length);
}

static void list_members(const char *name, char **list)
{
	member(name);
	putchar('[');
	for (int i = 0; list[i]; i++) {
		if (i)
			putchar(',');
		string(list[i]);
	}
	putchar(']');
}

static void namespaces(void)
{
	static const char *const kinds[] = { "mnt", "pid", "net", "ipc", "uts", "user", "cgroup", "time" };
	member("namespaces");
	putchar('{');
	for (size_t i = 0; i < sizeof(kinds) / sizeof(*kinds); i++) {
		char path[64], link[128];
		snprintf(path, sizeof(path), "/proc/self/ns/%s", kinds[i]);
		ssize_t length = readlink(path, link, sizeof(link));
		if (i)
			putchar(',');
		printf("\"%s\":", kinds[i]);
		if (length < 0)
			printf("null");
		else
			text(link, length);
	}
	putchar('}');
}

static void limits(void)
{
	static const struct {
		const char *name;
		int resource;
	} all[] = {
		{ "RLIMIT_AS", RLIMIT_AS }, { "RLIMIT_CORE", RLIMIT_CORE }, { "RLIMIT_CPU", RLIMIT_CPU },
		{ "RLIMIT_DATA", RLIMIT_DATA }, { "RLIMIT_FSIZE", RLIMIT_FSIZE },
		{ "RLIMIT_LOCKS", RLIMIT_LOCKS }, { "RLIMIT_MEMLOCK", RLIMIT_MEMLOCK },
		{ "RLIMIT_MSGQUEUE", RLIMIT_MSGQUEUE }, { "RLIMIT_NICE", RLIMIT_NICE },
		{ "RLIMIT_NOFILE", RLIMIT_NOFILE }, { "RLIMIT_NPROC", RLIMIT_NPROC },
		{ "RLIMIT_RSS", RLIMIT_RSS }, { "RLIMIT_RTPRIO", RLIMIT_RTPRIO },
		{ "RLIMIT_RTTIME", RLIMIT_RTTIME }, { "RLIMIT_SIGPENDING", RLIMIT_SIGPENDING },
		{ "RLIMIT_STACK", RLIMIT_STACK },
	};
	member("rlimits");
	putchar('{');
	for (size_t i = 0; i < sizeof(all) / sizeof(*all); i++) {
		struct rlimit limit = { 0, 0 };
		getrlimit(all[i].resource, &limit);
		printf("%s\"%s\":[%llu,%llu]", i ? "," : "", all[i].name, (unsigned long long)limit.rlim_cur,
		       (unsigned long long)limit.rlim_max);
	}
	putchar('}');
}

static void descriptors(void)
{
	DIR *dir = opendir("/proc/self/fd");
	int first = 1;
	member("fds");
	putchar('[');
	for (struct dirent *entry; dir && (entry = readdir(dir));) {
		if (entry->d_name[0] == '.' || atoi(entry->d_name) == dirfd(dir))
			continue;
		printf("%s%d", first ? "" : ",", atoi(entry->d_name));
		first = 0;
	}
	putchar(']');
	if (dir)
		closedir(dir);
}

static void terminal(void)
{
	struct winsize size = { 0 };
	member("tty");
	printf("[%s,%s,%s]", isatty(0) ? "true" : "false", isatty(1) ? "true" : "false", isatty(2) ? "true" : "false");
	ioctl(0, TIOCGWINSZ, &size);
	number("rows", size.ws_row);
	number("columns", size.ws_col);
	number("foreground", tcgetpgrp(0));
}

static void report(void)
{
	gid_t groups[256];
	struct utsname system;
	int count = getgroups(256, groups);
	mode_t mask = umask(0);
	cpu_set_t cpus;
	char where[4096];

	umask(mask);
	begin("report");
	number("pid", getpid());
	number("ppid", getppid());
	number("sid", getsid(0));
	number("pgid", getpgid(0));
	number("uid", getuid());
	number("euid", geteuid());
	number("gid", getgid());
	number("egid", getegid());
	member("groups");
	putchar('[');
	for (int i = 0; i < count; i++)
		printf("%s%u", i ? "," : "", groups[i]);
	putchar(']');
	number("umask", mask);
	member("cwd");
	if (getcwd(where, sizeof(where)))
		string(where);
	else
		printf("null");
	list_members("env", environ);
	limits();
	file_member("status", "/proc/self/status");
	file_member("mountinfo", "/proc/self/mountinfo");
	file_member("oom_score_adj", "/proc/self/oom_score_adj");
	file_member("cgroup", "/proc/self/cgroup");
	file_member("uid_map", "/proc/self/uid_map");
	file_member("gid_map", "/proc/self/gid_map");
	file_member("apparmor", "/proc/self/attr/current");
	file_member("interfaces", "/proc/net/dev");
	uname(&system);
	member("hostname");
	string(system.nodename);
	member("domainname");
	string(system.domainname);
	member("machine");
	string(system.machine);
	namespaces();
	number("personality", personality(0xffffffff));
	descriptors();
	terminal();
	number("scheduler", sched_getscheduler(0));
	number("nice", getpriority(PRIO_PROCESS, 0));
	number("ioprio", syscall(SYS_ioprio_get, 1, 0));
	CPU_ZERO(&cpus);
	sched_getaffinity(0, sizeof(cpus), &cpus);
	member("cpus");
	putchar('[');
	for (int i = 0, first = 1; i < CPU_SETSIZE; i++)
		if (CPU_ISSET(i, &cpus)) {
			printf("%s%d", first ? "" : ",", i);
			first = 0;
		}
	putchar(']');
	end();
}

/* Standard input, until its end. */
static void standard_input(void)
{
	static char content[65536];
	size_t have = 0;
	ssize_t got;
	while (have < sizeof(content) && (got = read(0, content + have, sizeof(content) - have)) > 0)
		have += got;
	begin("stdin");
	member("data");
	text(content, have);
	end();
}

/* "op", "path" and how a call went. */
static void outcome(const char *op, const char *path, long result)
{
	int error = result < 0 ? errno : 0;
	begin(op);
	member("path");
	string(path);
	number("errno", error);
}

static void status(const char *op, const char *path, int follow)
{
	struct stat found;
	long result = follow ? stat(path, &found) : lstat(path, &found);
	outcome(op, path, result);
	if (result == 0) {
		const char *kind = S_ISDIR(found.st_mode)  ? "dir" :
				   S_ISCHR(found.st_mode)  ? "char" :
				   S_ISBLK(found.st_mode)  ? "block" :
				   S_ISFIFO(found.st_mode) ? "fifo" :
				   S_ISLNK(found.st_mode)  ? "link" :
				   S_ISSOCK(found.st_mode) ? "socket" :
							     "file";
		member("type");
		string(kind);
		number("mode", found.st_mode & 07777);
		number("uid", found.st_uid);
		number("gid", found.st_gid);
		number("major", major(found.st_rdev));
		number("minor", minor(found.st_rdev));
		number("size", found.st_size);
	}
	end();
}

static void open_file(const char *op, const char *path, int flags)
{
	int fd = open(path, flags | O_NONBLOCK | O_CLOEXEC | O_NOCTTY);
	outcome(op, path, fd);
	end();
	if (fd >= 0)
		close(fd);
}

static void read_file(const char *path)
{
	char *content;
	long length = slurp(path, &content);
	outcome("read", path, length);
	if (length >= 0) {
		member("data");
		text(content, length);
	}
	end();
}

static void write_file(const char *op, const char *path, const char *what, int flags)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC | O_NOCTTY | flags, 0644);
	long result = fd < 0 ? -1 : write(fd, what, strlen(what));
	outcome(op, path, result);
	end();
	if (fd >= 0)
		close(fd);
}

static void list_directory(const char *path)
{
	DIR *dir = opendir(path);
	int first = 1;
	outcome("list", path, dir ? 0 : -1);
	member("names");
	putchar('[');
	for (struct dirent *entry; dir && (entry = readdir(dir));) {
		if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
			continue;
		if (!first)
			putchar(',');
		string(entry->d_name);
		first = 0;
	}
	putchar(']');
	end();
	if (dir)
		closedir(dir);
}

/* Runs a program that takes no arguments but "exit 0" of this one; set-user-ID bits and `noexec` show. */
static void execute(const char *path)
{
	int failed[2], error = 0, ended = 0;
	fflush(stdout);
	if (pipe2(failed, O_CLOEXEC) < 0)
		return;
	pid_t child = fork();
	if (child == 0) {
		execl(path, path, "whoami", (char *)NULL);
		error = errno;
		if (write(failed[1], &error, sizeof(error)) < 0)
			_exit(126);
		_exit(127);
	}
	close(failed[1]);
	if (read(failed[0], &error, sizeof(error)) <= 0)
		error = 0;
	close(failed[0]);
	waitpid(child, &ended, 0);
	errno = error;
	outcome("exec", path, error ? -1 : 0);
	end();
}

/* Any system call; a child makes it, for it may be killed for it. */
static void system_call(char **arguments, int count)
{
	long a[6] = { 0 };
	int ended = 0, result[2];
	long value[2] = { 0, 0 };
	for (int i = 1; i < count && i <= 6; i++)
		a[i - 1] = strtol(arguments[i], NULL, 0);
	fflush(stdout);
	if (pipe2(result, O_CLOEXEC) < 0)
		return;
	pid_t child = fork();
	if (child == 0) {
		value[0] = syscall(strtol(arguments[0], NULL, 0), a[0], a[1], a[2], a[3], a[4], a[5]);
		value[1] = value[0] < 0 ? errno : 0;
		if (write(result[1], value, sizeof(value)) < 0)
			_exit(126);
		_exit(0);
	}
	close(result[1]);
	if (read(result[0], value, sizeof(value)) <= 0)
		value[1] = -1;
	close(result[0]);
	waitpid(child, &ended, 0);
	begin("syscall");
	member("number");
	string(arguments[0]);
	number("result", value[0]);
	number("errno", value[1]);
	number("signal", WIFSIGNALED(ended) ? WTERMSIG(ended) : 0);
	end();
}

/* How many processes can be had at once, up to a number. */
static void fork_many(int wanted)
{
	int had = 0, error = 0;
	pid_t *children = calloc(wanted, sizeof(*children));
	fflush(stdout);
	for (; had < wanted; had++) {
		children[had] = fork();
		if (children[had] == 0) {
			pause();
			_exit(0);
		}
		if (children[had] < 0) {
			error = errno;
			break;
		}
	}
	for (int i = 0; i < had; i++)
		kill(children[i], SIGKILL);
	for (int i = 0; i < had; i++)
		waitpid(children[i], NULL, 0);
	free(children);
	begin("forks");
	number("count", had);
	number("errno", error);
	end();
}

/* A child that touches so many bytes: how it ended. */
static void touch_memory(size_t bytes)
{
	int ended = 0;
	fflush(stdout);
	pid_t child = fork();
	if (child == 0) {
		char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (memory == MAP_FAILED)
			_exit(1);
		for (size_t at = 0; at < bytes; at += 4096)
			memory[at] = 1;
		_exit(0);
	}
	waitpid(child, &ended, 0);
	begin("touch");
	number("bytes", (long long)bytes);
	number("signal", WIFSIGNALED(ended) ? WTERMSIG(ended) : 0);
	number("code", WIFEXITED(ended) ? WEXITSTATUS(ended) : -1);
	end();
}

static void wait_for_signal(void)
{
	sigset_t all;
	int got = 0;
	sigfillset(&all);
	sigprocmask(SIG_BLOCK, &all, NULL);
	begin("waiting");
	end();
	while (sigwait(&all, &got) == 0 && (got == SIGCHLD || got == SIGCONT || got == SIGWINCH))
		;
	begin("signal");
	number("signal", got);
	end();
}

/* What a hook does: keep its standard input, its arguments and what it sees in a file. */
static void hook(const char *path, int argc, char **argv)
{
	static char input[65536];
	size_t have = 0;
	ssize_t got;
	while (have < sizeof(input) && (got = read(0, input + have, sizeof(input) - have)) > 0)
		have += got;
	if (!freopen(path, "a", stdout))
		exit(71);
	begin("hook");
	member("stdin");
	text(input, have);
	list_members("args", argv);
	list_members("env", environ);
	namespaces();
	file_member("mountinfo", "/proc/self/mountinfo");
	number("argc", argc);
	number("pid", getpid());
	end();
}

static void statistics(const char *path)
{
	struct statfs found = { 0 };
	outcome("statfs", path, statfs(path, &found));
	unsigned_number("type", (unsigned long)found.f_type);
	unsigned_number("bytes", (unsigned long long)found.f_blocks * found.f_bsize);
	unsigned_number("files", found.f_files);
	end();
}

static void clocks(void)
{
	struct timespec boot = { 0 }, monotonic = { 0 };
	clock_gettime(CLOCK_BOOTTIME, &boot);
	clock_gettime(CLOCK_MONOTONIC, &monotonic);
	begin("clocks");
	number("boottime", boot.tv_sec);
	number("monotonic", monotonic.tv_sec);
	end();
}

/* Does the operation at argv[0] and returns how many words it took, 0 if it knows none of that name. */
static int operate(int argc, char **argv)
{
	const char *op = argv[0];
	const char *a = argc > 1 ? argv[1] : "";
	const char *b = argc > 2 ? argv[2] : "";

	if (!strcmp(op, "report"))
		return report(), 1;
	if (!strcmp(op, "read"))
		return read_file(a), 2;
	if (!strcmp(op, "write"))
		return write_file(op, a, b, O_CREAT | O_TRUNC), 3;
	if (!strcmp(op, "append"))
		return write_file(op, a, b, O_CREAT | O_APPEND), 3;
	if (!strcmp(op, "put")) /* into what exists, as devices and kernel files want it */
		return write_file(op, a, b, 0), 3;
	if (!strcmp(op, "stat"))
		return status(op, a, 1), 2;
	if (!strcmp(op, "lstat"))
		return status(op, a, 0), 2;
	if (!strcmp(op, "open"))
		return open_file(op, a, O_RDONLY), 2;
	if (!strcmp(op, "openw"))
		return open_file(op, a, O_WRONLY), 2;
	if (!strcmp(op, "list"))
		return list_directory(a), 2;
	if (!strcmp(op, "exec"))
		return execute(a), 2;
	if (!strcmp(op, "statfs"))
		return statistics(a), 2;
	if (!strcmp(op, "clocks"))
		return clocks(), 1;
	if (!strcmp(op, "mkdir")) {
		outcome(op, a, mkdir(a, 0755));
		return end(), 2;
	}
	if (!strcmp(op, "bind")) {
		outcome(op, a, mount(a, b, NULL, MS_BIND, NULL));
		return end(), 3;
	}
	if (!strcmp(op, "sethostname")) {
		outcome(op, a, sethostname(a, strlen(a)));
		return end(), 2;
	}
	if (!strcmp(op, "mknod") && argc > 4) {
		mode_t kind = b[0] == 'b' ? S_IFBLK : S_IFCHR;
		outcome(op, a, mknod(a, kind | 0600, makedev(atoi(argv[3]), atoi(argv[4]))));
		return end(), 5;
	}
	if (!strcmp(op, "readlink")) {
		char link[4096];
		ssize_t length = readlink(a, link, sizeof(link));
		outcome(op, a, length);
		if (length >= 0) {
			member("data");
			text(link, length);
		}
		return end(), 2;
	}
	if (!strcmp(op, "syscall")) {
		int count = 1;
		while (count < argc && strcmp(argv[count], "."))
			count++;
		system_call(argv + 1, count - 1);
		return count + 1;
	}
	if (!strcmp(op, "forks"))
		return fork_many(atoi(a)), 2;
	if (!strcmp(op, "touch"))
		return touch_memory(strtoull(a, NULL, 0)), 2;
	if (!strcmp(op, "signal"))
		return wait_for_signal(), 1;
	if (!strcmp(op, "stdin"))
		return standard_input(), 1;
	if (!strcmp(op, "argv")) {
		begin(op);
		list_members("args", argv + 1);
		return end(), argc;
	}
	if (!strcmp(op, "hook"))
		return hook(a, argc, argv), argc;
	if (!strcmp(op, "whoami")) { /* what a set-user-ID program run by `exec` tells */
		begin(op);
		number("uid", getuid());
		number("euid", geteuid());
		return end(), 1;
	}
	if (!strcmp(op, "echo")) {
		begin(op);
		member("text");
		string(a);
		return end(), 2;
	}
	if (!strcmp(op, "pause")) {
		begin(op);
		end();
		for (;;)
			pause();
	}
	if (!strcmp(op, "raise")) {
		raise(atoi(a));
		return 2;
	}
	if (!strcmp(op, "exit"))
		exit(atoi(a));
	return 0;
}

int main(int argc, char **argv)
{
	for (int at = 1; at < argc;) {
		int taken = operate(argc - at, argv + at);
		if (taken == 0) {
			fprintf(stderr, "probe: no such operation: %s\n", argv[at]);
			return 70;
		}
		at += taken;
	}
	return 0;
}
