/* File systems and file interfaces. The images in /images come with the initramfs. */
#include "features.h"
#include <dirent.h>
#include <linux/fanotify.h>
#include <linux/loop.h>
#include <linux/openat2.h>
#include <sys/fanotify.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/quota.h>
#include <sys/statfs.h>
#include <sys/swap.h>
#include <sys/xattr.h>

/* Attaches a file to a free loop device; its path in `device`. */
static const char *attach_loop(const char *image, int flags, char *device)
{
	int control = open("/dev/loop-control", O_RDWR), file = open(image, flags), loop, number;

	NEED(control >= 0);
	NEED(file >= 0);
	number = ioctl(control, LOOP_CTL_GET_FREE);
	NEED(number >= 0);
	sprintf(device, "/dev/loop%d", number);
	loop = open(device, flags);
	NEED(loop >= 0);
	NEED(!ioctl(loop, LOOP_SET_FD, file));
	close(control);
	return NULL;
}

/* Every erofs image holds "text": 100000 times the line "hull". */
static const char *read_erofs(const char *image)
{
	const char *folder = temporary_folder();
	char device[64], path[128], line[16];
	const char *wrong = attach_loop(image, O_RDONLY, device);
	FILE *text;
	int count = 0;

	if (wrong)
		return wrong;
	NEED(folder);
	if (mount(device, folder, "erofs", MS_RDONLY, NULL))
		return why("mount of %s:", image);
	snprintf(path, sizeof(path), "%s/text", folder);
	text = fopen(path, "r");
	NEED(text);
	while (fgets(line, sizeof(line), text)) {
		errno = 0;
		NEED(!strcmp(line, "hull\n"));
		count++;
	}
	fclose(text);
	errno = 0;
	NEED(count == 100000);
	snprintf(path, sizeof(path), "%s/text", folder);
	NEED(getxattr(path, "user.hull", line, sizeof(line)) == 5 || errno == ENODATA);
	NEED(!umount(folder));
	return NULL;
}

static const char *erofs_with_every_compressor(void)
{
	DIR *images = opendir("/images");
	struct dirent *entry;
	int count = 0;

	NEED(images);
	while ((entry = readdir(images)))
		if (!strncmp(entry->d_name, "erofs-", 6)) {
			char path[300];
			const char *wrong;

			snprintf(path, sizeof(path), "/images/%s", entry->d_name);
			if ((wrong = read_erofs(path)))
				return wrong;
			count++;
		}
	errno = 0;
	return count ? NULL : why("no image to mount");
}

static const char *ext4_read_and_write(void)
{
	char folder[64];
	char device[64], path[128], value[8];
	const char *wrong = attach_loop("/images/ext4.img", O_RDWR, device);
	int file;

	if (wrong)
		return wrong;
	strcpy(folder, temporary_folder());
	NEED(!mount(device, folder, "ext4", 0, NULL));
	snprintf(path, sizeof(path), "%s/file", folder);
	file = open(path, O_RDWR | O_CREAT, 0600);
	NEED(file >= 0);
	NEED(write(file, "content", 7) == 7);
	NEED(!fsetxattr(file, "user.name", "value", 5, 0));
	NEED(!fsetxattr(file, "security.name", "value", 5, 0));
	NEED(!fallocate(file, 0, 0, 65536));
	NEED(!fallocate(file, 3 /* punch a hole, keep the size */, 4096, 4096));
	NEED(!fsync(file));
	close(file);
	NEED(!umount(folder));
	NEED(!mount(device, folder, "ext4", 0, NULL));
	NEED(getxattr(path, "user.name", value, sizeof(value)) == 5);
	/* A file on it as swap. */
	{
		static char page[4096];
		uint32_t *header = (uint32_t *)(page + 1024);
		int swap;

		snprintf(path, sizeof(path), "%s/swap", folder);
		swap = open(path, O_RDWR | O_CREAT, 0600);
		NEED(swap >= 0);
		header[0] = 1;
		header[1] = 255;
		memcpy(page + 4086, "SWAPSPACE2", 10);
		NEED(write(swap, page, 4096) == 4096);
		memset(page, 0, sizeof(page));
		for (int i = 1; i < 256; i++)
			NEED(write(swap, page, 4096) == 4096);
		NEED(!fsync(swap));
		close(swap);
		NEED(!swapon(path, 0));
		NEED(!swapoff(path));
	}
	/* An EROFS image in a file on it, without a loop device. (tmpfs, on which the initramfs lies, does not offer that.) */
	{
		static char block[65536];
		const char *image = temporary_folder();
		int from = open("/images/erofs-plain.img", O_RDONLY), to;
		ssize_t length;

		snprintf(path, sizeof(path), "%s/image", folder);
		to = open(path, O_RDWR | O_CREAT, 0600);
		NEED(from >= 0 && to >= 0);
		while ((length = read(from, block, sizeof(block))) > 0)
			NEED(write(to, block, length) == length);
		close(from);
		close(to);
		NEED(!mount(path, image, "erofs", MS_RDONLY, NULL));
		NEED(!umount(image));
	}
	NEED(!umount(folder));
	return NULL;
}

static const char *overlay_over_two_layers(void)
{
	const char *folder = temporary_folder();
	char root[64], path[128], options[512];
	static const char *const names[] = { "a", "b", "upper", "work", "merged" };
	int file;

	NEED(folder);
	strcpy(root, folder);
	NEED(!mount("tmpfs", root, "tmpfs", 0, NULL));
	for (int i = 0; i < COUNT(names); i++) {
		snprintf(path, sizeof(path), "%s/%s", root, names[i]);
		NEED(!mkdir(path, 0755));
	}
	snprintf(path, sizeof(path), "%s/a/file", root);
	file = open(path, O_WRONLY | O_CREAT, 0644);
	NEED(file >= 0 && write(file, "a", 1) == 1);
	close(file);
	snprintf(options, sizeof(options), "lowerdir=%s/b:%s/a,upperdir=%s/upper,workdir=%s/work", root, root, root, root);
	snprintf(path, sizeof(path), "%s/merged", root);
	NEED(!mount("overlay", path, "overlay", 0, options));
	snprintf(path, sizeof(path), "%s/merged/file", root);
	NEED(!unlink(path));
	NEED(access(path, F_OK) == -1);
	snprintf(path, sizeof(path), "%s/upper/file", root);
	{
		struct stat whiteout;

		NEED(!lstat(path, &whiteout));
		errno = 0;
		NEED(S_ISCHR(whiteout.st_mode) && whiteout.st_rdev == 0);
	}
	return NULL;
}

static const char *tmpfs_with_attributes_and_acl(void)
{
	/* user::rw-, user:1000:r--, group::---, mask::r--, other::--- */
	static const unsigned char acl[] = { 2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 4, 0, 232, 3, 0, 0,
					     4, 0, 0, 0, 255, 255, 255, 255, 16, 0, 4, 0, 255, 255, 255, 255,
					     32, 0, 0, 0, 255, 255, 255, 255 };
	char path[64], value[8];
	int file = temporary_file(path, "x");

	NEED(file >= 0);
	NEED(!fsetxattr(file, "user.name", "value", 5, 0));
	NEED(!fsetxattr(file, "trusted.name", "value", 5, 0));
	NEED(!fsetxattr(file, "security.name", "value", 5, 0));
	NEED(!fsetxattr(file, "system.posix_acl_access", acl, sizeof(acl), 0));
	NEED(fgetxattr(file, "user.name", value, sizeof(value)) == 5);
	return NULL;
}

static const char *fuse_mounts(void)
{
	const char *folder = temporary_folder();
	char options[128];
	int device = open("/dev/fuse", O_RDWR);

	NEED(device >= 0);
	snprintf(options, sizeof(options), "fd=%d,rootmode=40000,user_id=0,group_id=0", device);
	NEED(!mount("fuse", folder, "fuse", 0, options));
	NEED(!umount2(folder, MNT_DETACH));
	return NULL;
}

static const char *kernel_filesystems_mount(void)
{
	static const char *const types[] = { "proc", "sysfs", "devpts", "devtmpfs", "mqueue", "hugetlbfs", "bpf", "binfmt_misc",
					     "securityfs", "ramfs", "cgroup2" };

	for (int i = 0; i < COUNT(types); i++) {
		const char *folder = temporary_folder();

		NEED(folder);
		if (mount(types[i], folder, types[i], 0, !strcmp(types[i], "devpts") ? "newinstance,ptmxmode=0666" : NULL))
			return why("mount of %s:", types[i]);
		NEED(!umount(folder));
	}
	return NULL;
}

static const char *virtiofs_is_known(void)
{
	const char *list = read_file("/proc/filesystems");

	NEED(list);
	errno = 0;
	NEED(strstr(list, "virtiofs"));
	return NULL;
}

static const char *new_mount_interface(void)
{
	int context = syscall(SYS_fsopen, "tmpfs", 0), mounted;
	struct { uint64_t set, clear, propagation, userns; } attributes = { 1 /* read-only */, 0, 0, 0 };
	const char *folder = temporary_folder();
	char path[128];

	NEED(context >= 0);
	NEED(!syscall(SYS_fsconfig, context, 1 /* string */, "size", "1m", 0));
	NEED(!syscall(SYS_fsconfig, context, 6 /* create */, NULL, NULL, 0));
	mounted = syscall(SYS_fsmount, context, 0, 0);
	NEED(mounted >= 0);
	NEED(!syscall(SYS_mount_setattr, mounted, "", AT_EMPTY_PATH, &attributes, sizeof(attributes)));
	NEED(!syscall(SYS_move_mount, mounted, "", AT_FDCWD, folder, 4 /* from an empty path */));
	snprintf(path, sizeof(path), "%s/x", folder);
	NEED(open(path, O_CREAT | O_WRONLY, 0600) == -1 && errno == EROFS);
	return NULL;
}

static const char *idmapped_mount(void)
{
	struct { uint64_t set, clear, propagation, userns; } attributes = { 0x100000 /* idmap */, 0, 0, 0 };
	const char *folder = temporary_folder();
	int tree, space, ends[2];
	char path[64], byte = 0;
	pid_t child;

	NEED(!pipe(ends));
	child = fork();
	if (child == 0) {
		_exit(syscall(SYS_unshare, 0x10000000 /* user */) || write(ends[1], "x", 1) != 1 || pause());
	}
	NEED(read(ends[0], &byte, 1) == 1);
	snprintf(path, sizeof(path), "/proc/%d/uid_map", child);
	NEED(!write_file(path, "0 1000 1"));
	snprintf(path, sizeof(path), "/proc/%d/gid_map", child);
	NEED(!write_file(path, "0 1000 1"));
	snprintf(path, sizeof(path), "/proc/%d/ns/user", child);
	space = open(path, O_RDONLY);
	NEED(space >= 0);
	tree = syscall(SYS_open_tree, AT_FDCWD, folder, 1 /* clone */ | O_CLOEXEC);
	NEED(tree >= 0);
	attributes.userns = space;
	NEED(!syscall(SYS_mount_setattr, tree, "", AT_EMPTY_PATH, &attributes, sizeof(attributes)));
	kill(child, SIGKILL);
	return NULL;
}

static const char *openat2_stays_inside(void)
{
	struct open_how how = { .flags = O_RDONLY, .resolve = RESOLVE_IN_ROOT };
	int root = open("/tmp", O_PATH | O_DIRECTORY);

	NEED(root >= 0);
	NEED(syscall(SYS_openat2, root, "../proc/self", &how, sizeof(how)) == -1 && errno == ENOENT);
	return NULL;
}

static const char *locks_of_every_kind(void)
{
	char path[64];
	int file = temporary_file(path, "x"), other, status;
	struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
	pid_t child;

	NEED(file >= 0);
	other = open(path, O_RDWR);
	NEED(!flock(file, LOCK_EX));
	NEED(flock(other, LOCK_EX | LOCK_NB) == -1 && errno == EWOULDBLOCK);
	NEED(!flock(file, LOCK_UN));
	NEED(!fcntl(file, F_OFD_SETLK, &lock));
	NEED(fcntl(other, F_OFD_SETLK, &lock) == -1 && errno == EAGAIN);
	lock.l_type = F_UNLCK;
	NEED(!fcntl(file, F_OFD_SETLK, &lock));
	lock.l_type = F_WRLCK;
	NEED(!fcntl(file, F_SETLK, &lock));
	child = fork();
	if (child == 0)
		_exit(fcntl(other, F_SETLK, &lock) != -1);
	NEED(waitpid(child, &status, 0) == child);
	errno = 0;
	NEED(status == 0);
	close(other);
	lock.l_type = F_UNLCK;
	NEED(!fcntl(file, F_SETLK, &lock));
	close(file);
	file = open(path, O_RDONLY);
	NEED(!fcntl(file, F_SETLEASE, F_RDLCK));
	return NULL;
}

static const char *inotify_reports(void)
{
	const char *folder = temporary_folder();
	int watch = inotify_init1(IN_NONBLOCK);
	char path[128], event[512];

	NEED(watch >= 0);
	NEED(inotify_add_watch(watch, folder, IN_CREATE) >= 0);
	snprintf(path, sizeof(path), "%s/new", folder);
	NEED(open(path, O_CREAT | O_WRONLY, 0600) >= 0);
	NEED(read(watch, event, sizeof(event)) > 0);
	errno = 0;
	NEED(!strcmp(((struct inotify_event *)event)->name, "new"));
	return NULL;
}

static const char *fanotify_permission_group(void)
{
	int group = fanotify_init(FAN_CLASS_CONTENT | FAN_NONBLOCK, O_RDONLY);

	NEED(group >= 0);
	NEED(!fanotify_mark(group, FAN_MARK_ADD | FAN_MARK_MOUNT, FAN_OPEN_PERM, AT_FDCWD, "/tmp"));
	return NULL;
}

static const char *file_handles_open(void)
{
	struct { struct file_handle handle; unsigned char bytes[128]; } name = { .handle.handle_bytes = 128 };
	char path[64];
	int file = temporary_file(path, "x"), mount_id, folder = open("/tmp", O_RDONLY);

	NEED(file >= 0);
	NEED(!name_to_handle_at(AT_FDCWD, path, &name.handle, &mount_id, 0));
	NEED(open_by_handle_at(folder, &name.handle, O_RDONLY) >= 0);
	return NULL;
}

static const char *copy_range_and_statx(void)
{
	char from[64], to[64];
	int source = temporary_file(from, "content"), target = temporary_file(to, NULL);
	off_t zero = 0;
	struct statx status;

	NEED(copy_file_range(source, &zero, target, NULL, 7, 0) == 7);
	NEED(!statx(AT_FDCWD, to, 0, STATX_ALL, &status));
	errno = 0;
	NEED(status.stx_size == 7);
	return NULL;
}

const struct check filesystem_checks[] = {
	{ "erofs_with_every_compressor", erofs_with_every_compressor },
	{ "ext4_read_and_write", ext4_read_and_write },
	{ "overlay_over_two_layers", overlay_over_two_layers },
	{ "tmpfs_with_attributes_and_acl", tmpfs_with_attributes_and_acl },
	{ "fuse_mounts", fuse_mounts },
	{ "kernel_filesystems_mount", kernel_filesystems_mount },
	{ "virtiofs_is_known", virtiofs_is_known },
	{ "new_mount_interface", new_mount_interface },
	{ "idmapped_mount", idmapped_mount },
	{ "openat2_stays_inside", openat2_stays_inside },
	{ "locks_of_every_kind", locks_of_every_kind },
	{ "inotify_reports", inotify_reports },
	{ "fanotify_permission_group", fanotify_permission_group },
	{ "file_handles_open", file_handles_open },
	{ "copy_range_and_statx", copy_range_and_statx },
};
const int filesystem_count = COUNT(filesystem_checks);
