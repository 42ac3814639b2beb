# The user and the folders redis-server's package makes when it is configured.
grep -q '^redis:' etc/passwd || echo 'redis:x:101:101::/var/lib/redis:/usr/sbin/nologin' >>etc/passwd
grep -q '^redis:' etc/group || echo 'redis:x:101:' >>etc/group
mkdir -p data var/lib/redis var/log/redis
chown 101:101 data var/lib/redis var/log/redis
chmod 750 data var/lib/redis var/log/redis
ldconfig -r .
rm -rf etc/apt var/lib/apt var/cache/apt var/cache/ldconfig var/log/*.log
