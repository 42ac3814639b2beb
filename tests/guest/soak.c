/* Init of the soak: puts a writable layer over the read-only root on /dev/vda, enters it and runs soak.sh there.
 *
 * The script's own reports go to the console; what this program adds is the end.
 */
#include "guest.h"
#include <sys/resource.h>

static int copy(const char *from, const char *to)
{
	static char buffer[65536];
	int source = open(from, O_RDONLY), target = open(to, O_WRONLY | O_CREAT | O_TRUNC, 0755);
	ssize_t length;

	if (source < 0 || target < 0)
		return -1;
	while ((length = read(source, buffer, sizeof(buffer))) > 0)
		if (write(target, buffer, length) != length)
			return -1;
	close(source);
	close(target);
	return length;
}

static const char *enter_root(void)
{
	static const char *const folders[] = { "/lower", "/layer", "/root" };
	static const char *const mounts[][2] = { { "proc", "/root/proc" },	{ "sysfs", "/root/sys" },
						 { "devtmpfs", "/root/dev" },	{ "tmpfs", "/root/tmp" },
						 { "tmpfs", "/root/run" },	{ "devpts", "/root/dev/pts" },
						 { "tmpfs", "/root/dev/shm" } };

	for (int i = 0; i < COUNT(folders); i++)
		mkdir(folders[i], 0755);
	NEED(!mount("/dev/vda", "/lower", "erofs", MS_RDONLY, NULL));
	NEED(!mount("tmpfs", "/layer", "tmpfs", 0, NULL));
	NEED(!mkdir("/layer/upper", 0755));
	NEED(!mkdir("/layer/work", 0755));
	NEED(!mount("overlay", "/root", "overlay", 0, "lowerdir=/lower,upperdir=/layer/upper,workdir=/layer/work"));
	for (int i = 0; i < COUNT(mounts); i++) {
		mkdir(mounts[i][1], 0755);
		NEED(!mount(mounts[i][0], mounts[i][1], mounts[i][0], 0, NULL));
	}
	chmod("/root/tmp", 01777);
	chmod("/root/dev/shm", 01777);
	NEED(!copy("/soak.sh", "/root/soak.sh"));
	NEED(!copy("/isolation", "/root/isolation"));
	NEED(!chroot("/root"));
	NEED(!chdir("/"));
	return NULL;
}

int main(void)
{
	struct rlimit files = { 65536, 65536 };
	const char *seconds, *wrong;
	int status;
	pid_t child;

	become_init();
	seconds = kernel_parameter("soak_seconds");
	setenv("SOAK_SECONDS", seconds ? seconds : "60", 1);
	setenv("PATH", "/usr/sbin:/usr/bin:/sbin:/bin", 1);
	setenv("LC_ALL", "C", 1);
	setrlimit(RLIMIT_NOFILE, &files);
	wrong = enter_root();
	if (wrong) {
		report("{\"check\":\"enter_root\",\"ok\":false,\"detail\":\"%s\"}", wrong);
		return finish("soak", 1, 1);
	}
	child = fork();
	if (child == 0) {
		execl("/bin/sh", "sh", "/soak.sh", NULL);
		_exit(127);
	}
	/* Orphans of the workloads are reaped here, as init must. */
	while (waitpid(-1, &status, 0) != child)
		;
	return finish("soak", 0, WIFEXITED(status) ? WEXITSTATUS(status) : 255);
}
