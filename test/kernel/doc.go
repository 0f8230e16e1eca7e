// Package kernel runs tests of other packages on another kernel than this
// host's: in a virtual machine that boots a Debian kernel, with cgroup2 as the
// only hierarchy, and no distribution around it.
//
// `make test-kernel` fetches the kernel and runs it. Without the kernel in
// .cache/kernel or without qemu-system-x86_64 the test is skipped. It writes
// nothing on this host but files in a temporary folder, needs no root, and takes
// 1 GiB of memory and about half a minute under emulation.
package kernel
