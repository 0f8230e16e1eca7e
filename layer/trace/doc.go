// Package trace sees what happens to packets and connections on this host, in
// whatever network namespace: which packets died, where in the kernel and for what
// reason, which connections were refused, reset or never came about, which errors
// programs met. Package cause, below it, makes verdicts of that.
//
// It works on stable tracepoints alone (trace.bpf.c), so that it needs no kprobe and
// no function of the kernel by name. What a kernel does not have is told (Missing).
//
// What it writes in the kernel: nothing that stays. Its programs and maps hang on
// this process and are gone with it, however it ends.
//
// What it costs: attaching takes some 300 ms of processor time on two busy cores. Events
// are counted in the kernel, at a look or two into a hash map each; user space gets
// one example of each new kind of event, at most 256 a second from each program and
// processor. What had to be left out of the table of events is in the totals. The map
// of events takes at most 10 MB, all else about 1 MB and 0.2 MB a processor. The layer, which
// counts all the time, keeps examples and the numbers of connections that have ended in the
// kernel, in another 2 MB.
package trace
