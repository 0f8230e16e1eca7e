package bench

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/cgroup"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/kernel/proc"
)

// What a lookup is of: a name outside, by the search list that kubelet writes for a pod
// of the namespace shop on a host without a domain.
const (
	dnsZone      = "cluster.local"
	dnsOutside   = "api.example.com"
	dnsServices  = 1000
	dnsNamespace = "shop"
)

var dnsSearches = []string{dnsNamespace + ".svc." + dnsZone, "svc." + dnsZone, dnsZone}

// Addresses of DNS: the DNS Service's, and those of servers beside it on the same node.
var dnsAddresses = map[string]netip.Addr{
	Millrace: netip.MustParseAddr("10.96.0.10"), MillraceList: netip.MustParseAddr("10.96.0.10"),
	CoreDNS: netip.MustParseAddr("10.96.0.11"), Unbound: netip.MustParseAddr("10.96.0.12"),
}

// dnsTown is a node with a pod for each variant, all joined to it alike, and its servers.
type dnsTown struct {
	folder, node, group string
	worker              []string
	cpus                []int
	pods                map[string]*dnsPod
	upstream            *upstream
	// services are the cluster's, names with their addresses, outside those of others.
	services map[string]netip.Addr
	outside  map[string]netip.Addr
	workers  []*process
	attached []func() error
}

// dnsPod is a client's namespace and what stands in its resolv.conf.
type dnsPod struct {
	netns, device string
	// resolver is the path of its resolv.conf, other that of one which another process of
	// it sees, where there is one.
	resolver, other string
	server          netip.Addr
}

func newTown(ctx context.Context, run *run, worker []string, cpus []int) (*dnsTown, error) {
	town := &dnsTown{
		folder: run.namespaces, node: filepath.Join(run.namespaces, "dns-node"), group: filepath.Join(run.group, "dns"),
		worker: worker, cpus: cpus, pods: map[string]*dnsPod{}, services: map[string]netip.Addr{},
		outside: map[string]netip.Addr{dnsOutside: netip.MustParseAddr("192.0.2.80")},
	}
	for i := range dnsServices {
		address := netip.AddrFrom4([4]byte{10, 97, byte(i >> 8), byte(i)})
		town.services[fmt.Sprintf("web-%d.%s.svc.%s", i, dnsNamespace, dnsZone)] = address
	}
	err := cgroup.Create(town.group)
	if err == nil {
		err = netns.Create(town.node)
	}
	if err == nil {
		err = netns.Do(town.node, func() error { return errors.Join(settings(), raiseLoopback()) })
	}
	for i, variant := range []string{Millrace, MillraceList, CoreDNS, Unbound} {
		if err == nil {
			err = town.addPod(i, variant)
		}
	}
	if err == nil {
		town.upstream, err = town.startUpstream()
	}
	if err != nil {
		return nil, errors.Join(err, town.close())
	}
	return town, ctx.Err()
}

// raiseLoopback has the servers' addresses, too.
func raiseLoopback() error {
	servers := slices.Compact(slices.SortedFunc(maps.Values(dnsAddresses), netip.Addr.Compare))
	for _, server := range servers {
		lo, err := netlink.LinkByName("lo")
		if err == nil {
			err = netlink.AddrAdd(lo, &netlink.Addr{IPNet: &net.IPNet{IP: server.AsSlice(), Mask: net.CIDRMask(32, 32)}})
		}
		if err != nil {
			return fmt.Errorf("add address %s to lo: %w", server, err)
		}
	}
	return nil
}

// addPod joins a pod to the node by a veth, and writes its resolv.conf.
func (t *dnsTown) addPod(i int, variant string) error {
	pod := &dnsPod{netns: filepath.Join(t.folder, "dns-"+variant), device: fmt.Sprintf("pod%d", i), server: dnsAddresses[variant]}
	if err := errors.Join(netns.Create(pod.netns), netns.Do(pod.netns, settings)); err != nil {
		return err
	}
	t.pods[variant] = pod
	gateway := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(i), 1}), 30)
	own := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(i), 2}), 30)
	if err := (&bed{node: t.node}).connect(pod.netns, pod.device, []netip.Prefix{own}, gateway); err != nil {
		return err
	}
	// the folder of namespaces is the run's own; see removeRun
	pod.resolver = filepath.Join(filepath.Dir(t.folder), variant+".resolv.conf")
	text := fmt.Sprintf("nameserver %s\nsearch %s\noptions ndots:5\n", pod.server, strings.Join(dnsSearches, " "))
	files := map[string]string{pod.resolver: text, filepath.Join(filepath.Dir(t.folder), switchFile): "hosts: files dns\n", filepath.Join(filepath.Dir(t.folder), hostsFile): "127.0.0.1 localhost\n"}
	if variant == MillraceList {
		pod.other = filepath.Join(filepath.Dir(t.folder), variant+".other.conf")
		files[pod.other] = fmt.Sprintf("nameserver %s\nsearch %s\noptions ndots:5\n", pod.server, dnsZone)
	}
	for file, text := range files {
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			return fmt.Errorf("write a pod's files: %w", err)
		}
	}
	return nil
}

// spec is what is under test.
func (t *dnsTown) spec() DNSSpec {
	spec := DNSSpec{
		NetNS: t.node, Zone: dnsZone, Service: dnsAddresses[Millrace], Services: map[string]netip.Addr{}, Outside: t.outside,
	}
	for name, address := range t.services {
		spec.Services[strings.TrimSuffix(name, "."+dnsZone)] = address
	}
	return spec
}

// command is an operation in a pod.
func (t *dnsTown) command(pod *dnsPod, operation string) dnsCommand {
	return dnsCommand{
		Operation: operation, Server: netip.AddrPortFrom(pod.server, 53), Names: slices.Sorted(maps.Keys(t.services)),
		Name: dnsOutside, Searches: dnsSearches,
	}
}

// sent is how many UDP packets a pod has sent.
func (p *dnsPod) sent() (count uint64, err error) {
	err = netns.Do(p.netns, func() error {
		text, err := os.ReadFile("/proc/thread-self/net/snmp")
		if err == nil {
			count, err = proc.Counter(string(text), "Udp.OutDatagrams")
		}
		return err
	})
	return count, err
}

// startIn starts a program in a pod, with the pod's resolv.conf.
func (t *dnsTown) startIn(ctx context.Context, pod *dnsPod, what string, program ...string) (*process, error) {
	return t.startWith(ctx, pod, pod.resolver, what, program...)
}

// startWith starts one with a resolv.conf of its own.
func (t *dnsTown) startWith(ctx context.Context, pod *dnsPod, resolver, what string, program ...string) (*process, error) {
	args := slices.Concat([]string{"dns", "-cpus=" + joined(t.cpus), "-resolver=" + resolver, "--"}, program)
	p, err := startWorker(ctx, what, t.worker, pod.netns, t.group, args...)
	if p != nil {
		t.workers = append(t.workers, p)
	}
	return p, err
}

// startServer starts a CoreDNS or an unbound at its address; alsoDNS has it at the DNS
// Service's, too. It returns the number of its process.
func (t *dnsTown) startServer(ctx context.Context, variant, program string, alsoDNS bool) (pid int, err error) {
	addresses := []string{dnsAddresses[variant].String()}
	if alsoDNS {
		addresses = append(addresses, dnsAddresses[Millrace].String())
	}
	file := filepath.Join(filepath.Dir(t.folder), variant+".conf")
	text, args := coreDNSConfig(addresses), []string{program, "-conf", file}
	if variant == Unbound {
		text, args = unboundConfig(addresses, len(t.cpus)), []string{program, "-d", "-p", "-c", file}
	}
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		return 0, fmt.Errorf("write the configuration of %s: %w", variant, err)
	}
	p, err := startWorker(ctx, variant, t.worker, t.node, t.group, slices.Concat([]string{"dns", "-keep", "-cpus=" + joined(t.cpus), "--"}, args)...)
	if err != nil {
		return 0, err
	}
	t.workers = append(t.workers, p)
	return p.first.Pid, t.await(ctx, p, dnsAddresses[variant])
}

// await asks a server until it answers.
func (t *dnsTown) await(ctx context.Context, p *process, at netip.Addr) error {
	query := appendQuestion(nil, 1, dnsOutside, typeA)
	var conn net.Conn
	err := netns.Do(t.node, func() (err error) {
		conn, err = net.Dial("udp", netip.AddrPortFrom(at, 53).String())
		return err
	})
	if err != nil {
		return fmt.Errorf("ask %s: %w", p.what, err)
	}
	defer conn.Close()
	answer := make([]byte, 1500)
	for begun := time.Now(); time.Since(begun) < patience && ctx.Err() == nil; {
		if unix.Kill(p.first.Pid, 0) != nil {
			return p.died(fmt.Errorf("it does not serve %s", at))
		}
		_, _ = conn.Write(query)
		_ = conn.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		if n, err := conn.Read(answer); err == nil && n > headerSize && answer[3]&0x0f == 0 {
			return nil
		} else if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			time.Sleep(20 * time.Millisecond) // nobody is there yet
		}
	}
	return errors.Join(ctx.Err(), fmt.Errorf("%s does not answer at %s", p.what, at))
}

// close takes everything away, as far as it can, and says what it could not.
func (t *dnsTown) close() error {
	var errs []error
	for _, p := range t.workers {
		p.stop()
	}
	for _, detach := range t.attached {
		errs = append(errs, detach())
	}
	if t.upstream != nil {
		t.upstream.close()
	}
	for _, pod := range t.pods {
		errs = append(errs, netns.Remove(pod.netns))
	}
	errs = append(errs, netns.Remove(t.node), cgroup.Remove(t.group))
	return errors.Join(errs...)
}

// coreDNSConfig is a cache that forwards, as a cache on a node is configured
// (https://github.com/kubernetes/kubernetes/blob/master/cluster/addons/dns/nodelocaldns/nodelocaldns.yaml),
// for answers that may be kept for an hour.
func coreDNSConfig(addresses []string) string {
	return fmt.Sprintf(`.:53 {
	bind %s
	cache 3600 {
		success 9984 3600
		denial 9984 3600
	}
	forward . %s
}
`, strings.Join(addresses, " "), upstreamAddress)
}

// unboundConfig is a cache that forwards, with a thread for each processor and a socket for
// each thread (https://unbound.docs.nlnetlabs.nl/en/latest/topics/core/performance.html).
func unboundConfig(addresses []string, threads int) string {
	var interfaces strings.Builder
	for _, address := range addresses {
		fmt.Fprintf(&interfaces, "\tinterface: %s\n", address)
	}
	return fmt.Sprintf(`server:
%s	num-threads: %d
	so-reuseport: yes
	msg-cache-size: 16m
	rrset-cache-size: 32m
	msg-cache-slabs: 2
	rrset-cache-slabs: 2
	infra-cache-slabs: 2
	key-cache-slabs: 2
	module-config: "iterator"
	access-control: 0.0.0.0/0 allow
	do-ip6: no
	do-not-query-localhost: no
	do-daemonize: no
	use-syslog: no
	use-systemd: no
	logfile: ""
	chroot: ""
	username: ""
	directory: ""
	pidfile: ""
	hide-version: yes
remote-control:
	control-enable: no
forward-zone:
	name: "."
	forward-addr: %s@%d
`, interfaces.String(), threads, upstreamAddress.Addr(), upstreamAddress.Port())
}
