# The links update-alternatives makes when the BLAS is configured.
lib=usr/lib/x86_64-linux-gnu
for name in libblas.so.3 liblapack.so.3 libopenblas.so.0; do
    ln -sf openblas-pthread/$name $lib/$name
done
ldconfig -r .
rm -rf var/cache/ldconfig usr/lib/python3/dist-packages/numpy/tests usr/lib/python3/dist-packages/numpy/*/tests
