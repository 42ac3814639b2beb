# The user and the folders postgresql-common makes when it is configured; the version's programs on the PATH.
grep -q '^postgres:' etc/passwd || echo 'postgres:x:102:102::/var/lib/postgresql:/bin/bash' >>etc/passwd
grep -q '^postgres:' etc/group || echo 'postgres:x:102:' >>etc/group
mkdir -p var/lib/postgresql/data run/postgresql
chown 102:102 var/lib/postgresql var/lib/postgresql/data run/postgresql
chmod 700 var/lib/postgresql/data
chmod 2775 run/postgresql
mkdir -p usr/local/bin
for program in usr/lib/postgresql/*/bin/*; do
    ln -sf "/$program" "usr/local/bin/${program##*/}"
done
rm -rf usr/lib/postgresql/*/lib/llvmjit* usr/lib/postgresql/*/lib/bitcode usr/lib/llvm-* usr/lib/x86_64-linux-gnu/libLLVM* \
    usr/lib/x86_64-linux-gnu/libz3* usr/share/perl usr/lib/x86_64-linux-gnu/perl usr/lib/x86_64-linux-gnu/libperl* usr/share/i18n
ldconfig -r .
rm -rf var/cache/ldconfig
