ldconfig -r .
rm -rf var/cache/ldconfig
