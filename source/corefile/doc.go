// Package corefile reads the configuration of CoreDNS, as far as it says who answers for
// the cluster's zone, and who is asked for the rest (https://coredns.io/manual/toc/).
//
// It is for knowing when others may answer in CoreDNS' place, and is never guessing:
// what it does not understand is left to CoreDNS, with the line and the reason. It is not
// for checking a Corefile, it opens no file and reads no environment. It takes CoreDNS'
// own lexer; not its parser, which opens files that import names, on this host. Those are keys
// of ConfigMaps here, where the Deployment mounts them (Files).
//
// Of the plugin hosts the table is read, inline or from such a key, so that its names can be
// left by themselves.
//
// What counts is the order in which CoreDNS asks its plugins, which is not that of the
// text (core/dnsserver/zdirectives.go): whoever comes before kubernetes may answer in its
// place, and whoever comes before forward in that one's.
//
// It takes 0.16 ms on a busy machine for the Corefile of kubeadm (BenchmarkRead), and 5 ms of
// processor time with a table of 5,000 hosts (BenchmarkHosts), once for each version of them.
package corefile
