[ -e usr/bin/node ] || ln -s nodejs usr/bin/node
ldconfig -r .
rm -rf var/cache/ldconfig
