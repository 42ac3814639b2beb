//! Puts a container's root filesystem together: EROFS layers, a writable layer, overlayfs over both.
//!
//! Everything is below `/run/hull/<container>/`, except the layers, which are mounted at short paths
//! (`/run/l/<n>`) because all lower directories must fit into one page of mount options.

use std::{
    fs,
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
};

use agent_protocol::{FileContent, Rootfs, UPPER_DIR, WORK_DIR, rootfs::Upper};
use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
};

use crate::{block, error::AgentError, init::RUN_DIR, log::log, shares};

const LAYERS_DIR: &str = "/run/l";

/// A mounted root filesystem. Dropping it unmounts.
#[derive(Debug)]
pub struct MountedRootfs {
    /// The container's root.
    pub root: PathBuf,
    /// Files to mount over the image: (source, destination in the container).
    pub files: Vec<(PathBuf, PathBuf)>,
    /// Mount points in the order they were mounted.
    mounted: Vec<PathBuf>,
    dir: PathBuf,
    /// The writable layer, if it outlives the microVM.
    kept: Option<PathBuf>,
}

fn io_errno(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

fn make_dir(path: &Path) -> Result<(), AgentError> {
    fs::create_dir_all(path)
        .map_err(|error| AgentError::rootfs(format!("creating {}", path.display()))(io_errno(&error)))
}

impl MountedRootfs {
    /// Mounts what the request describes.
    pub fn mount(container_id: &str, spec: &Rootfs, all_devices: bool) -> Result<Self, AgentError> {
        // A device node of the image, or one made in the root, opens nothing: see `process::mounts`.
        let flags = if all_devices {
            MsFlags::empty()
        } else {
            MsFlags::MS_NODEV
        };
        let dir = Path::new(RUN_DIR).join(container_id);
        let mut this = Self {
            root: dir.join("rootfs"),
            files: Vec::new(),
            mounted: Vec::new(),
            dir: dir.clone(),
            kept: None,
        };
        if let Some(share) = spec.share {
            this.mount_share(share, flags)?;
            return Ok(this);
        }
        let lower = this.mount_layers(&spec.layer_serials)?;
        let upper = dir.join("upper");
        make_dir(&this.root)?;
        match &spec.upper {
            Some(Upper::TmpfsBytes(bytes)) => {
                // No limit on inodes beside the microVM's memory, which the size doesn't bound either.
                let options = format!("size={bytes},nr_inodes=0,mode=0700");
                this.mount_at("tmpfs", &upper, "tmpfs", MsFlags::empty(), &options)?;
                this.mount_overlay(spec, &lower, Some(&upper), flags)?;
            }
            Some(Upper::BlockSerial(serial)) => {
                let device = device(serial, spec.layer_serials.len() + 1)?;
                // What is freed goes back to the host, where the file is sparse.
                let flags = MsFlags::MS_NOATIME | MsFlags::MS_NODEV;
                this.mount_at(&device, &upper, "ext4", flags, "discard").map_err(|error| match error {
                    AgentError::Rootfs { errno, .. } => AgentError::Rootfs {
                        step: format!(
                            "mounting the container's writable layer, ext4 on the disk {serial:?} (writable.ext4 in \
                             the container's folder); if it is damaged, e2fsck may repair it"
                        ),
                        errno,
                    },
                    other => other,
                })?;
                this.kept = Some(upper.clone());
                this.mount_overlay(spec, &lower, Some(&upper), flags)?;
            }
            Some(Upper::UpperShare(share)) => {
                let upper = shares::path(*share).map_err(AgentError::rootfs("mounting the shares"))?;
                this.mount_over_share(&lower, &upper, flags)?;
            }
            // Without a writable layer; `Bounded` lets that through only for a read-only root.
            _ => this.mount_read_only(spec, &lower, flags)?,
        }
        Ok(this)
    }

    fn mount_at(
        &mut self,
        source: &str,
        target: &Path,
        kind: &str,
        flags: MsFlags,
        options: &str,
    ) -> Result<(), AgentError> {
        make_dir(target)?;
        mount(Some(source), target, Some(kind), flags, Some(options))
            .map_err(AgentError::rootfs(format!("mounting {kind} {source}")))?;
        self.mounted.push(target.to_owned());
        Ok(())
    }

    /// Mounts the layers and returns their directories, top layer first as overlayfs wants them.
    fn mount_layers(&mut self, serials: &[String]) -> Result<Vec<String>, AgentError> {
        let mut lower = Vec::with_capacity(serials.len());
        for (index, serial) in serials.iter().enumerate() {
            // The first disk is the microVM's own root.
            let device = device(serial, index + 1)?;
            let target = format!("{LAYERS_DIR}/{index}");
            match self.mount_at(&device, Path::new(&target), "erofs", MsFlags::MS_RDONLY, "") {
                // Another container of this microVM has it, too.
                Err(AgentError::Rootfs {
                    errno: Errno::EBUSY, ..
                }) => {}
                mounted => mounted?,
            }
            lower.push(target);
        }
        if lower.is_empty() {
            // An image without layers is an empty root.
            let empty = self.dir.join("empty");
            make_dir(&empty)?;
            lower.push(empty.display().to_string());
        }
        lower.reverse();
        Ok(lower)
    }

    fn mount_overlay(
        &mut self,
        spec: &Rootfs,
        lower: &[String],
        upper: Option<&Path>,
        flags: MsFlags,
    ) -> Result<(), AgentError> {
        let mut options = format!("lowerdir={}", lower.join(":"));
        if let Some(upper) = upper {
            let (diff, work) = (upper.join("diff"), upper.join("work"));
            make_dir(&work)?;
            // One that was kept has what the container made of it.
            if !diff.is_dir() {
                make_dir(&diff)?;
                set_root_metadata(&diff, spec)?;
            }
            options += &format!(
                ",upperdir={},workdir={},redirect_dir=on,metacopy=off",
                diff.display(),
                work.display()
            );
        }
        let root = self.root.clone();
        self.mount_at("overlay", &root, "overlay", flags, &options)
    }

    /// The host reads what is written: everything is in its overlayfs' form, which moves no directory of a layer below and
    /// marks nothing but what hides something.
    fn mount_over_share(&mut self, lower: &[String], share: &Path, flags: MsFlags) -> Result<(), AgentError> {
        let options = format!(
            "lowerdir={},upperdir={},workdir={},redirect_dir=nofollow,metacopy=off,index=off,xino=off,uuid=null",
            lower.join(":"),
            share.join(UPPER_DIR).display(),
            share.join(WORK_DIR).display(),
        );
        let root = self.root.clone();
        self.mount_at("overlay", &root, "overlay", flags, &options)
    }

    fn mount_read_only(&mut self, spec: &Rootfs, lower: &[String], flags: MsFlags) -> Result<(), AgentError> {
        let [only] = lower else {
            return self.mount_overlay(spec, lower, None, flags);
        };
        let root = self.root.clone();
        self.mount_at(only, &root, "", MsFlags::MS_BIND, "")?;
        let flags = flags | MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(None::<&str>, &root, None::<&str>, flags, None::<&str>)
            .map_err(AgentError::rootfs("making the root read-only"))
    }

    /// A read-only one is sealed when everything is mounted on it.
    fn mount_share(&mut self, share: u32, flags: MsFlags) -> Result<(), AgentError> {
        let root = self.root.clone();
        let source = shares::path(share).map_err(AgentError::rootfs("mounting the shares"))?;
        self.mount_at(&source.display().to_string(), &root, "", MsFlags::MS_BIND, "")?;
        let flags = flags | MsFlags::MS_BIND | MsFlags::MS_REMOUNT;
        mount(None::<&str>, &root, None::<&str>, flags, None::<&str>)
            .map_err(AgentError::rootfs("setting the flags of the root"))
    }

    /// A filesystem for its devices, outside of the root.
    pub fn mount_devices(&mut self) -> Result<PathBuf, AgentError> {
        let place = self.dir.join("dev");
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
        self.mount_at("devices", &place, "tmpfs", flags, "mode=0755")?;
        Ok(place)
    }

    /// Whether its files outlive the microVM.
    pub fn is_kept(&self) -> bool {
        self.kept.is_some()
    }

    /// Writes back what is kept and, where nobody uses it any more, closes its journal.
    pub fn seal(&self) {
        let Some(upper) = &self.kept else { return };
        nix::unistd::sync();
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        if let Err(errno) = mount(None::<&str>, upper, None::<&str>, flags, None::<&str>) {
            log!("closing the writable layer: {errno}");
        }
    }

    /// The container's root directory.
    pub fn open_root(&self) -> Result<fs::File, AgentError> {
        fs::File::open(&self.root).map_err(|error| AgentError::rootfs("opening the root")(io_errno(&error)))
    }

    /// Writes the files the host gives, outside of the root, to be mounted over it.
    pub fn write_files(&mut self, files: &[FileContent]) -> Result<(), AgentError> {
        let dir = self.dir.join("files");
        make_dir(&dir)?;
        for (index, file) in files.iter().enumerate() {
            let source = dir.join(index.to_string());
            let mode = fs::Permissions::from_mode(file.mode);
            fs::write(&source, &file.content)
                .and_then(|()| fs::set_permissions(&source, mode))
                .map_err(|error| AgentError::setup(format!("writing {}", file.path))(io_errno(&error)))?;
            self.files.push((source, PathBuf::from(&file.path)));
        }
        Ok(())
    }
}

fn device(serial: &str, index: usize) -> Result<String, AgentError> {
    let path = block::find(serial, index)
        .ok_or_else(|| AgentError::rootfs(format!("finding the disk {serial:?}"))(Errno::ENODEV))?;
    Ok(path.display().to_string())
}

fn set_root_metadata(root: &Path, spec: &Rootfs) -> Result<(), AgentError> {
    let mode = if spec.root_mode == 0 {
        0o755
    } else {
        spec.root_mode
    };
    chown(root, Some(spec.root_uid), Some(spec.root_gid))
        .and_then(|()| fs::set_permissions(root, fs::Permissions::from_mode(mode)))
        .map_err(|error| AgentError::rootfs("setting the root directory's owner and mode")(io_errno(&error)))
}

impl Drop for MountedRootfs {
    fn drop(&mut self) {
        for target in self.mounted.iter().rev() {
            // Lazily: a process that is just dying may still be in there.
            let _ = umount2(target, MntFlags::MNT_DETACH);
        }
        drop(fs::remove_dir_all(&self.dir));
    }
}
