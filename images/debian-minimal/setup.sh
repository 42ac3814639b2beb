# What base-files, base-passwd, libc-bin and mawk do when they are configured.
cp usr/share/base-passwd/passwd.master etc/passwd
cp usr/share/base-passwd/group.master etc/group
chmod 644 etc/passwd etc/group
chmod 1777 tmp var/tmp
chmod 700 root
mkdir -p run/lock
chmod 1777 run/lock
rm -rf var/run var/lock
ln -s /run var/run
ln -s /run/lock var/lock
[ -e etc/profile ] || cp usr/share/base-files/profile etc/profile
[ -e root/.profile ] || cp usr/share/base-files/dot.profile root/.profile
[ -e root/.bashrc ] || cp usr/share/base-files/dot.bashrc root/.bashrc
[ -e etc/nsswitch.conf ] || cp usr/share/libc-bin/nsswitch.conf etc/nsswitch.conf
[ -e usr/bin/awk ] || ln -s mawk usr/bin/awk
ldconfig -r .
# The package sources are this machine's, not the image's; apt is not in it.
rm -rf etc/apt var/lib/apt var/cache/apt var/cache/ldconfig var/log/*.log
