# What only C++, sanitizers and the compiler's own debugging need.
lib=usr/lib/gcc/x86_64-linux-gnu/*
rm -f $lib/lto1 $lib/lto-wrapper $lib/lib*san*.a usr/lib/x86_64-linux-gnu/lib*san.so*
rm -rf $lib/plugin usr/src/lua5.4/doc usr/src/bzip2/*.pdf usr/src/bzip2/*.ps
ldconfig -r .
rm -rf var/cache/ldconfig
