/* Memory interfaces. */
#include "features.h"
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sys/ioctl.h>

static void *map(size_t size)
{
	void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	return memory == MAP_FAILED ? NULL : memory;
}

static const char *huge_pages_come_unasked(void)
{
	const char *mode = read_file("/sys/kernel/mm/transparent_hugepage/enabled");
	size_t size = 8 << 20;
	char *memory;
	FILE *maps;
	char line[256];
	long huge = 0, kib;

	NEED(mode && strstr(mode, "[always]"));
	memory = map(size);
	NEED(memory);
	memset(memory, 1, size);
	maps = fopen("/proc/self/smaps", "r");
	NEED(maps);
	while (fgets(line, sizeof(line), maps))
		if (sscanf(line, "AnonHugePages: %ld", &kib) == 1)
			huge += kib;
	errno = 0;
	return huge >= 4096 ? NULL : why("only %ld KiB of 8 MiB in huge pages", huge);
}

static void *touch(void *page)
{
	return (void *)(uintptr_t) * (volatile unsigned char *)page;
}

static const char *userfaultfd_serves_a_fault(void)
{
	int handler = syscall(SYS_userfaultfd, O_CLOEXEC);
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register range = { .mode = UFFDIO_REGISTER_MODE_MISSING };
	struct uffd_msg event;
	struct uffdio_copy copy = { .len = 4096 };
	static char content[4096] __attribute__((aligned(4096)));
	char *page = map(4096);
	pthread_t thread;
	void *seen;

	NEED(handler >= 0);
	NEED(!ioctl(handler, UFFDIO_API, &api));
	range.range.start = (uintptr_t)page;
	range.range.len = 4096;
	NEED(!ioctl(handler, UFFDIO_REGISTER, &range));
	NEED(!pthread_create(&thread, NULL, touch, page));
	NEED(read(handler, &event, sizeof(event)) == sizeof(event));
	content[0] = 42;
	copy.dst = (uintptr_t)page;
	copy.src = (uintptr_t)content;
	NEED(!ioctl(handler, UFFDIO_COPY, &copy));
	pthread_join(thread, &seen);
	errno = 0;
	NEED((uintptr_t)seen == 42);
	return NULL;
}

static const char *memfd_seals_and_huge_memfd(void)
{
	int file = memfd_create("sealed", MFD_ALLOW_SEALING);

	NEED(file >= 0);
	NEED(!ftruncate(file, 4096));
	NEED(!fcntl(file, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE));
	NEED(write(file, "x", 1) == -1 && errno == EPERM);
	NEED(ftruncate(file, 8192) == -1 && errno == EPERM);
	NEED(memfd_create("huge", MFD_HUGETLB) >= 0);
	return NULL;
}

static const char *secret_memory(void)
{
	int file = syscall(447 /* memfd_secret */, 0);
	char *memory;

	NEED(file >= 0);
	NEED(!ftruncate(file, 4096));
	memory = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	NEED(memory != MAP_FAILED);
	memory[0] = 1;
	return NULL;
}

static const char *explicit_huge_pages(void)
{
	char *memory;

	NEED(!write_file("/proc/sys/vm/nr_hugepages", "2"));
	memory = mmap(NULL, 2 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1, 0);
	NEED(memory != MAP_FAILED);
	memset(memory, 1, 2 << 20);
	munmap(memory, 2 << 20);
	NEED(!write_file("/proc/sys/vm/nr_hugepages", "0"));
	return NULL;
}

static const char *advice_of_every_kind(void)
{
	static const int advice[] = { MADV_DONTNEED, MADV_FREE, MADV_COLD, MADV_PAGEOUT, MADV_HUGEPAGE, MADV_NOHUGEPAGE,
				      MADV_DONTFORK, MADV_WIPEONFORK, MADV_POPULATE_READ, MADV_POPULATE_WRITE, MADV_DONTDUMP };
	size_t size = 4 << 20;
	char *memory = map(size);

	NEED(memory);
	memset(memory, 1, size);
	for (int i = 0; i < COUNT(advice); i++)
		if (madvise(memory, size, advice[i]))
			return why("advice %d:", advice[i]);
	NEED(mremap(memory, size, size * 2, MREMAP_MAYMOVE) != MAP_FAILED);
	return NULL;
}

static const char *locking_and_names(void)
{
	char *memory = map(65536);

	NEED(memory);
	NEED(!mlock(memory, 65536));
	NEED(!munlock(memory, 65536));
	NEED(!mlock2(memory, 65536, MLOCK_ONFAULT));
	NEED(!prctl(0x53564d41 /* PR_SET_VMA */, 0, memory, 65536, "hull"));
	NEED(!syscall(SYS_membarrier, 0, 0, 0) || errno != ENOSYS);
	NEED(!access("/proc/self/pagemap", R_OK));
	NEED(!access("/proc/vmstat", R_OK));
	return NULL;
}

const struct check memory_checks[] = {
	{ "huge_pages_come_unasked", huge_pages_come_unasked },
	{ "userfaultfd_serves_a_fault", userfaultfd_serves_a_fault },
	{ "memfd_seals_and_huge_memfd", memfd_seals_and_huge_memfd },
	{ "secret_memory", secret_memory },
	{ "explicit_huge_pages", explicit_huge_pages },
	{ "advice_of_every_kind", advice_of_every_kind },
	{ "locking_and_names", locking_and_names },
};
const int memory_count = COUNT(memory_checks);
