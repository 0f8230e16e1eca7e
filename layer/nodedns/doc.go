// Package nodedns has the agent answer what the node's own processes, and hostNetwork pods,
// ask the cluster's DNS Service.
//
// Their queries pass no pod's veth, where layer/dns would see them. So programs at connect()
// and sendmsg() of UDP sockets send what is for the DNS Service's address, port 53, to a
// socket of the agent's on loopback; recvmsg() and getpeername() show the Service. That is
// so only in the node's own network namespace, and only while the kernel has the agent's
// socket and its last beat is no older than half a second: else the call goes on as if nobody
// had looked at it. What the agent cannot answer it asks the DNS Service itself and relays.
// A filter at its sockets keeps what waits: the successor of an agent that was killed answers
// that. docs/decisions/0014-dns.md says why it is so.
//
// What it writes in the kernel: seven maps, eight programs with a link each at one cgroup,
// pinned in a folder of its own. It has to see a call before the Service's address is
// translated (layer/service: Settings.Behind). Nothing in routes, sysctls, nftables or
// resolv.conf.
//
// What it costs: 540 bytes of kernel memory for each query that waits, 1.1 MB at most; a
// call that is not for a DNS port a few instructions; a query the agent's look at it, where
// layer/dns answers in the kernel. Ten times a second the agent writes that it is there.
//
// Off means gone: Remove takes links, maps and the folder away. A socket that was connected
// to the agent is refused with what it sends next, and its resolver asks again.
//
// Not here: TCP, which goes to the Service; sockets that are bound to a device, or send by one;
// pods.
package nodedns
