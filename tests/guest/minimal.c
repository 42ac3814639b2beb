/* The smallest init: says that it was reached, how much memory is in use and how many CPUs are on, then stops the
 * machine.
 */
#include "guest.h"
#include <sys/sysinfo.h>

int main(void)
{
	struct sysinfo info;
	struct timespec since_boot;

	become_init();
	clock_gettime(CLOCK_BOOTTIME, &since_boot);
	sysinfo(&info);
	report("{\"init\":true,\"cpus\":%ld,\"total_kib\":%lu,\"free_kib\":%lu,\"uptime_us\":%ld}",
	       sysconf(_SC_NPROCESSORS_ONLN), info.totalram * info.mem_unit >> 10, info.freeram * info.mem_unit >> 10,
	       since_boot.tv_sec * 1000000 + since_boot.tv_nsec / 1000);
	return finish("minimal", 0, 0);
}
