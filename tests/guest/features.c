/* Is every kernel feature a container may use there and working? Each check uses the feature; none reads a config. */
#include "features.h"

int temporary_file(char *path, const char *content)
{
	int file;

	strcpy(path, "/tmp/fileXXXXXX");
	file = mkstemp(path);
	if (file >= 0 && content && write(file, content, strlen(content)) != (ssize_t)strlen(content)) {
		close(file);
		return -1;
	}
	return file;
}

const char *temporary_folder(void)
{
	static char path[64];

	strcpy(path, "/tmp/folderXXXXXX");
	return mkdtemp(path);
}

int main(int arguments, char **names)
{
	int failed = 0, count;

	if (arguments > 0 && strstr(names[0], "features-helper"))
		return 42;
	become_init();
	mkdir("/sys/fs/cgroup", 0755);
	mount("cgroup2", "/sys/fs/cgroup", "cgroup2", 0, NULL);
	failed += run_checks(filesystem_checks, filesystem_count);
	failed += run_checks(container_checks, container_count);
	failed += run_checks(network_checks, network_count);
	failed += run_checks(memory_checks, memory_count);
	failed += run_checks(process_checks, process_count);
	count = filesystem_count + container_count + network_count + memory_count + process_count;
	return finish("features", count, failed);
}
