# The folders nginx-common makes when it is configured; logs go where `hull logs` reads them; the default site is switched on.
mkdir -p var/lib/nginx var/log/nginx var/www/html etc/nginx/sites-enabled etc/nginx/modules-enabled
chown 33:33 var/lib/nginx
ln -sf /dev/stdout var/log/nginx/access.log
ln -sf /dev/stderr var/log/nginx/error.log
ln -sf ../sites-available/default etc/nginx/sites-enabled/default
[ -e var/www/html/index.html ] || cp usr/share/nginx/html/index.html var/www/html/index.html
ldconfig -r .
rm -rf var/cache/ldconfig
