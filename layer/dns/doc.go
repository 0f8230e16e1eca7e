// Package dns answers on the node what pods ask about names of the cluster.
//
// An eBPF program at the node's side of each pod's veth sees queries to the cluster's
// DNS Service before anybody else. Where the question is plain, and the name one whose
// state the agent knows from its watch, the program turns the query into the answer
// and gives it back to the pod: Services, headless ones and their endpoints, names that
// do not exist. Names outside the cluster are answered for as long as what Learn was told
// of them is true, and the first name of a search list with what the list leads to. All
// else goes to the agent, if it serves (Layer.Serve), or on to whoever serves the DNS
// Service, and so does everything when the agent has been silent for two seconds (where
// the DNS Service has endpoints; else what is known is answered for five minutes): the
// layer can be killed, upgraded and removed, and no query is lost.
// docs/decisions/0014-dns.md says what is answered and what is not.
//
// What it writes in the kernel: seven maps, a program and a link for each pod's veth
// (before Linux 6.6 a clsact filter), pinned in a folder of its own. Nothing in
// routes, sysctls, nftables or resolv.conf.
//
// What it costs: 2.1 MB of kernel memory and 328 bytes a name, 512 for one outside;
// 100,000 names are there after 0.6 s of processor time. Each packet of a pod is looked
// at for a few instructions. An answer costs the program about 1.5 us (BenchmarkQuery, a
// machine under load), one with eight addresses 2.0, and nothing else on the node. Every
// half second the agent writes that it is there; every ten it reads the resolv.conf of
// the pods (kernel/resolv), which takes CAP_SYS_PTRACE.
//
// Off means gone: Remove takes links, maps and the folder away, and queries go where
// they went before.
//
// Not here: asking servers, types other than A and AAAA, TCP, pods' own records,
// hostNetwork pods (layer/nodedns). Where a Corefile says otherwise about the zone, it is left whole.
package dns
