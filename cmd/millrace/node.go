package main

import (
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/millrace/millrace/kernel/cgroup"
	"github.com/millrace/millrace/kernel/cpu"
	"github.com/millrace/millrace/kernel/sysctl"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/dns"
	"github.com/millrace/millrace/layer/masquerade"
	"github.com/millrace/millrace/layer/nodedns"
	"github.com/millrace/millrace/layer/pod"
	"github.com/millrace/millrace/layer/route"
	"github.com/millrace/millrace/layer/service"
	"github.com/millrace/millrace/layer/trace"
	"github.com/millrace/millrace/layer/tune"
	"github.com/millrace/millrace/model"
)

// place says where on a host millrace works. Two places on one host (the nodes
// of a lab) do not meet.
type place struct {
	cgroup, pins, run string
	// node is this node's name in the cluster; path, conntrack and flows are the
	// service layer's settings.
	node, path, conntrack string
	flows                 int
	// pods says that the node's pods get their network here, and ways to those of other
	// nodes.
	pods bool
	// podLayer is the one that gives it to them, once it is made.
	podLayer *pod.Layer
	// hostPorts are those of the pods.
	hostPorts hostPorts
	// dns is the zone whose names are answered on the node; empty where none is.
	dns string
	// nodeDNS says that the node's own queries are answered, too, and nodeDNSLayer is the
	// layer that sends them here, once it is made.
	nodeDNS      bool
	nodeDNSLayer *nodedns.Layer
	// heard is when the source last knew the cluster; nil is always now.
	heard func() time.Time
	// wire says that packets from other machines are served, too.
	wire bool
	// nodePorts and clusterCIDRs are the service layer's settings of these names; nil
	// where no configuration of a kube-proxy says otherwise.
	nodePorts, clusterCIDRs []netip.Prefix
	primary                 bool
	// procSys is the folder that stands for /proc/sys. tracking is what a kube-proxy's
	// configuration asks of connection tracking, and trackingFrom where it is.
	procSys, trackingFrom string
	tracking              model.Conntrack
}

func (p *place) flagRun(c *cobra.Command) {
	c.Flags().StringVar(&p.run, "run", "/run/millrace/agent", "folder of the agent's lock and socket")
}

func (p *place) flagPins(c *cobra.Command) {
	c.Flags().StringVar(&p.pins, "pins", "/sys/fs/bpf/millrace", "folder in a bpf file system for what has to outlive the agent")
}

func (p *place) flagCgroup(c *cobra.Command) {
	c.Flags().StringVar(&p.cgroup, "cgroup", "", "cgroup2 folder whose processes are served (default: the root of the hierarchy)")
}

func (p *place) flagNode(c *cobra.Command) {
	c.Flags().StringVar(&p.node, "node", hostname(), "this node's name in the cluster")
}

func (p *place) flagPath(c *cobra.Command) {
	c.Flags().StringVar(&p.path, "path", string(service.PathSocket),
		"where Services are served for pods that do not ask (annotation "+service.PathAnnotation+"): socket or packet")
}

func (p *place) flagWire(c *cobra.Command) {
	c.Flags().BoolVar(&p.wire, "wire", true, "serve packets from other machines: node ports, external and load balancers' addresses")
}

func (p *place) flagConntrack(c *cobra.Command) {
	c.Flags().StringVar(&p.conntrack, "conntrack", string(service.ConntrackAuto),
		"connections between pods in the conntrack table: auto leaves them out where nobody's rules need them, bypass always, keep never")
}

func (p *place) flagFlows(c *cobra.Command) {
	c.Flags().IntVar(&p.flows, "flows", service.DefaultFlows, "how many flows of the packet path are remembered at once")
}

func (p *place) flagDNS(c *cobra.Command) {
	c.Flags().StringVar(&p.dns, "dns", "",
		"answer pods' queries for names of the cluster in the kernel: the cluster's domain, such as cluster.local (default: leave them all to the cluster's DNS servers)")
}

func (p *place) flagProcSys(c *cobra.Command) {
	c.Flags().StringVar(&p.procSys, "proc-sys", "", "folder through which settings of the node are set (default: "+sysctl.Mounted+" where that is mounted, else /proc/sys)")
}

// layers are all that there are, in the order in which they are applied. This
// list is the only place that knows them.
func (p *place) layers() ([]layer.Layer, error) {
	if p.cgroup == "" {
		root, err := cgroup.Root()
		if err != nil {
			return nil, err
		}
		p.cgroup = root
	}
	if _, err := service.ParsePath(p.path); err != nil {
		return nil, usage("--path: %v", err)
	}
	if _, err := service.ParseConntrack(p.conntrack); err != nil {
		return nil, usage("--conntrack: %v", err)
	}
	if p.flows < 0 || p.flows > service.MostFlows {
		return nil, usage("--flows %d: use 1 to %d", p.flows, service.MostFlows)
	}
	return p.wanted()
}

// wanted are the layers that are switched on.
func (p *place) wanted() (layers []layer.Layer, err error) {
	if p.dns != "" {
		if p.dns, err = dns.ParseZone(p.dns); err != nil {
			return nil, usage("--dns: %v", err)
		}
	}
	if p.nodeDNS && p.dns == "" {
		return nil, usage("%s goes with --dns: the agent answers the node for that zone", nodeDNSWord)
	}
	return slices.DeleteFunc(p.pinned(), p.isOff), nil
}

// isOff says that a layer is not asked for.
func (p *place) isOff(l layer.Layer) bool {
	switch l.(type) {
	case *dns.Layer:
		return p.dns == ""
	case *nodedns.Layer:
		return !p.nodeDNS
	case *pod.Layer, *route.Layer, *masquerade.Layer:
		return !p.pods
	}
	return false
}

// pinned are the layers for looking at what outlives the agent and for removing it,
// which takes no cgroup.
func (p *place) pinned() []layer.Layer {
	// What the node asks before the services: its programs have to see a call first. Names
	// after the services: their program has to be in front of those. Routes after pods: their
	// program takes its place ahead of that of pods, which has to be there to be found. What
	// leaves the cluster last: its program sees what all others have made of a packet.
	return []layer.Layer{p.nodeNames(), p.service(), p.tune(), p.trace(), p.names(), p.network(), p.routes(), p.masquerade()}
}

// podsWord, behind a command, switches the layers pod, route and masquerade on, nodeDNSWord
// the layer nodedns.
const podsWord, nodeDNSWord = "pods", "nodedns"

// also reads which layers are asked for beside those that always are.
func (p *place) also(args []string) error {
	for _, word := range args {
		switch word {
		case podsWord:
			p.pods = true
		case nodeDNSWord:
			p.nodeDNS = true
		default:
			return usage("%q is no layer to switch on: say %s, %s, or nothing", word, podsWord, nodeDNSWord)
		}
	}
	return nil
}

func (p *place) service() layer.Layer {
	settings := service.Settings{
		Cgroup: p.cgroup, Pins: filepath.Join(p.pins, "service"),
		Node: p.node, Path: service.Path(p.path), Flows: p.flows, Conntrack: service.Conntrack(p.conntrack),
		Wire: p.wire, NodePortAddresses: p.nodePorts, NodePortPrimary: p.primary, ClusterCIDRs: p.clusterCIDRs,
	}
	if p.dns != "" {
		settings.Seen = dns.DefaultService
	}
	if p.nodeDNS {
		settings.Behind = p.nodeNames().Program
	}
	if p.pods {
		settings.Claim = p.network().Claim
	}
	return service.New(settings)
}

func (p *place) names() *dns.Layer {
	return dns.New(dns.Settings{Zone: p.dns, Pins: filepath.Join(p.pins, "dns"), Heard: p.heard})
}

// nodeNames is always the same: the service layer and the resolver have to ask the one in
// force.
func (p *place) nodeNames() *nodedns.Layer {
	if p.nodeDNSLayer == nil {
		p.nodeDNSLayer = nodedns.New(nodedns.Settings{Service: dns.DefaultService, Cgroup: p.cgroup, Pins: filepath.Join(p.pins, "nodedns")})
	}
	return p.nodeDNSLayer
}

// network is always the same: the service layer has to talk to the one in force.
func (p *place) network() *pod.Layer {
	if p.podLayer == nil {
		settings := pod.Settings{Node: p.node, Pins: filepath.Join(p.pins, "pod"), Folder: filepath.Join(p.run, "pod"), Socket: filepath.Join(p.run, "cni.sock")}
		settings.HostLocal = hostLocal
		if isFolder(mountedHostLocal) {
			settings.HostLocal = mountedHostLocal
		}
		if isFolder(mountedPlugins) && isFolder(mountedNetworks) {
			settings.Plugins, settings.Networks = mountedPlugins, mountedNetworks
		}
		if p.servesHostPorts() {
			p.hostPorts = make(hostPorts, 1)
			settings.HostPorts = p.hostPorts.tell
		}
		p.podLayer = pod.New(settings)
	}
	return p.podLayer
}

// Where a container finds the folders of the node's container runtime. Who mounts them
// wants the plugin to be there.
const (
	mountedPlugins  = "/host/opt/cni/bin"
	mountedNetworks = "/host/etc/cni/net.d"
)

// hostLocal is where the plugin host-local writes down which addresses it has given, and
// mountedHostLocal where a container finds that.
const (
	hostLocal        = "/var/lib/cni/networks"
	mountedHostLocal = "/host/var/lib/cni/networks"
)

func isFolder(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

func (p *place) routes() *route.Layer {
	return route.New(route.Settings{Node: p.node, Pins: filepath.Join(p.pins, "route"), Homes: filepath.Join(p.pins, "pod", pod.Homes)})
}

func (p *place) masquerade() *masquerade.Layer {
	return masquerade.New(masquerade.Settings{Node: p.node, Pins: filepath.Join(p.pins, "masquerade")})
}

func (p *place) trace() *trace.Layer {
	return trace.New(trace.Settings{Pins: filepath.Join(p.pins, "trace"), Whole: isWholeMachine()})
}

// isWholeMachine says that this process is where the kernel's own threads are: a node
// that is a namespace of a machine, as in the lab, is not.
func isWholeMachine() bool {
	name, err := os.ReadFile("/proc/2/comm")
	if err != nil || strings.TrimSpace(string(name)) != "kthreadd" {
		return false
	}
	first, err := os.Readlink("/proc/2/ns/net")
	own, wrong := os.Readlink("/proc/self/ns/net")
	return err == nil && wrong == nil && first == own
}

func (p *place) tune() layer.Layer {
	return tune.New(tune.Settings{
		Conntrack: p.tracking, From: p.trackingFrom, CPUs: processors(),
		Tree: sysctl.Tree{Root: p.procSys}, Folder: filepath.Join(p.run, "tune"),
	})
}

// processors are those of the machine, or where that cannot be read those of this
// process.
func processors() int {
	n, err := cpu.Online()
	if err != nil {
		return runtime.NumCPU()
	}
	return n
}

func hostname() string {
	name, err := os.Hostname()
	if err != nil {
		return ""
	}
	return name
}
