/* The smallest init: says that it was reached, how much memory is in use and how many CPUs are on, then stops the
 * machine.
 */
#include "guest.h"
#include <sys/sysinfo.h>

/* Free pages in the CPUs' own lists: free, but not counted as such by sysinfo(). */
static long listed_free_kib(void)
{
	const char *text = read_file("/proc/zoneinfo"), *at;
	long pages = 0;

	for (at = text; at && (at = strstr(at, " count: ")); at++)
		pages += strtol(at + 8, NULL, 10);
	return pages * 4;
}

int main(void)
{
	struct sysinfo info;
	struct timespec since_boot;

	become_init();
	clock_gettime(CLOCK_BOOTTIME, &since_boot);
	sysinfo(&info);
	report("{\"init\":true,\"cpus\":%ld,\"total_kib\":%lu,\"free_kib\":%lu,\"uptime_us\":%ld}",
	       sysconf(_SC_NPROCESSORS_ONLN), info.totalram * info.mem_unit >> 10, (info.freeram * info.mem_unit >> 10) + listed_free_kib(),
	       since_boot.tv_sec * 1000000 + since_boot.tv_nsec / 1000);
	return finish("minimal", 0, 0);
}
