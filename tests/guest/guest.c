#include "guest.h"

static int is_init;

double now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e9 + t.tv_nsec;
}

const char *why(const char *format, ...)
{
	static char text[512];
	int error = errno;
	va_list arguments;
	size_t length;

	va_start(arguments, format);
	vsnprintf(text, sizeof(text) - 64, format, arguments);
	va_end(arguments);
	length = strlen(text);
	if (length && text[length - 1] == ':')
		snprintf(text + length, sizeof(text) - length, " %s", strerror(error));
	for (char *c = text; *c; c++)
		if (*c == '"' || *c == '\\' || *c == '\n')
			*c = '\'';
	return text;
}

int write_file(const char *path, const char *text)
{
	int file = open(path, O_WRONLY | O_CLOEXEC);
	ssize_t length = strlen(text), written;

	if (file < 0)
		return -1;
	written = write(file, text, length);
	close(file);
	return written == length ? 0 : -1;
}

const char *read_file(const char *path)
{
	static char text[65536];
	int file = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t length = 0, count;

	if (file < 0)
		return NULL;
	while ((count = read(file, text + length, sizeof(text) - 1 - length)) > 0)
		length += count;
	close(file);
	text[length] = 0;
	return count < 0 ? NULL : text;
}

void report(const char *format, ...)
{
	char line[1024];
	va_list arguments;
	int length;

	va_start(arguments, format);
	length = vsnprintf(line, sizeof(line) - 1, format, arguments);
	va_end(arguments);
	if (length < 0)
		return;
	if (length > (int)sizeof(line) - 2)
		length = sizeof(line) - 2;
	line[length++] = '\n';
	if (write(1, "HULL ", 5) == 5)
		(void)!write(1, line, length);
}

int become_init(void)
{
	int console;

	if (getpid() != 1)
		return 0;
	is_init = 1;
	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	mkdir("/dev", 0755);
	mkdir("/tmp", 01777);
	mount("proc", "/proc", "proc", 0, NULL);
	mount("sysfs", "/sys", "sysfs", 0, NULL);
	mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
	mount("tmpfs", "/tmp", "tmpfs", 0, "mode=1777");
	console = open("/dev/console", O_RDWR);
	if (console >= 0) {
		dup2(console, 0);
		dup2(console, 1);
		dup2(console, 2);
	}
	return 1;
}

const char *kernel_parameter(const char *name)
{
	static char copy[4096];
	const char *line = read_file("/proc/cmdline");
	size_t length = strlen(name);

	if (!line)
		return NULL;
	snprintf(copy, sizeof(copy), "%s", line);
	for (char *word = strtok(copy, " \n"); word; word = strtok(NULL, " \n"))
		if (!strncmp(word, name, length) && word[length] == '=')
			return word + length + 1;
	return NULL;
}

static int run_check(const struct check *check)
{
	int ends[2], status = 0;
	char text[512] = "";
	ssize_t length;
	pid_t child;
	double begin = now_ns();
	const char *limit = getenv("CHECK_SECONDS");

	if (pipe(ends))
		return 1;
	child = fork();
	if (child == 0) {
		const char *wrong;

		close(ends[0]);
		setpgid(0, 0);
		alarm(limit ? atoi(limit) : 300);
		wrong = check->run();
		if (wrong)
			(void)!write(ends[1], wrong, strlen(wrong));
		_exit(wrong ? 1 : 0);
	}
	close(ends[1]);
	if (child < 0)
		return 1;
	waitpid(child, &status, 0);
	/* What the check left running. */
	kill(-child, SIGKILL);
	fcntl(ends[0], F_SETFL, O_NONBLOCK);
	length = read(ends[0], text, sizeof(text) - 1);
	text[length > 0 ? length : 0] = 0;
	close(ends[0]);
	if (WIFEXITED(status) && WEXITSTATUS(status) == 0) {
		report("{\"check\":\"%s\",\"ok\":true,\"ms\":%.0f}", check->name, (now_ns() - begin) / 1e6);
		return 0;
	}
	if (WIFSIGNALED(status) && !text[0])
		snprintf(text, sizeof(text), "killed by signal %d", WTERMSIG(status));
	report("{\"check\":\"%s\",\"ok\":false,\"detail\":\"%s\"}", check->name, text);
	return 1;
}

int run_checks(const struct check *checks, int count)
{
	int failed = 0;

	for (int i = 0; i < count; i++)
		failed += run_check(&checks[i]);
	return failed;
}

int finish(const char *name, int checks, int failed)
{
	report("{\"done\":\"%s\",\"checks\":%d,\"failed\":%d}", name, checks, failed);
	if (is_init) {
		sync();
		/* A serial port drains behind our back under some machines. */
		tcdrain(1);
		reboot(RB_AUTOBOOT);
	}
	return failed != 0;
}
