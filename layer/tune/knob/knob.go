// Package knob is the table of what can be tuned of a node's network: each Knob with its
// settings, where they are, how its values are computed for the machine and where that is
// written, what justifies it, and what speaks against it. Plan is pure: what was read of
// a machine in, proposals out.
//
// It reads and writes nothing and costs nothing; package tune looks and sets.
package knob

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/millrace/millrace/model"
)

// Scope says where a setting is, and so for whom it is.
type Scope string

// The scopes.
const (
	// Machine is one value for all namespaces, set on the node.
	Machine Scope = "machine"
	// Namespace is a value in each network namespace; a new one begins with the kernel's,
	// whatever the node's is.
	Namespace Scope = "namespace"
	// Copied is a value in each network namespace; a new one begins with the node's.
	Copied Scope = "copied"
	// Device is of the devices of a namespace.
	Device Scope = "device"
	// Proxy is a field of the configuration of the cluster's kube-proxy, one for all
	// nodes, which each kube-proxy reads when it starts.
	Proxy Scope = "kube-proxy"
)

// Profile is a set of knobs for a purpose.
type Profile string

// The profiles.
const (
	Latency         Profile = "latency"
	Throughput      Profile = "throughput"
	ManyConnections Profile = "many-connections"
)

// Profiles are all that there are.
var Profiles = []Profile{Latency, Throughput, ManyConnections}

// Knob is something that can be tuned, by one setting or a few that go together.
type Knob struct {
	// ID is stable: people and journals name it.
	ID string
	// Settings are names as Space.Values has them; those of devices begin with "*/".
	Settings []string
	Scope    Scope
	// Title says what it is.
	Title string
	// Formula says how the value is computed, Source where that is written.
	Formula, Source string
	// Evidence is what justifies it.
	Evidence string
	// Checks are the checks of doctor that it answers.
	Checks []string
	// Pitfall is what the usual advice gets wrong, and what speaks against it.
	Pitfall string
	// Profiles are those that it is part of.
	Profiles []Profile
	// Safe says that a pod may ask for it by securityContext.sysctls without the
	// kubelet's --allowed-unsafe-sysctls.
	Safe bool

	// want says which values the settings should have, in the order in which they are to
	// be set; or why nothing is to be done.
	want func(*view) (wishes []wish, why string)
}

// wish is the value that a setting should have; with atLeast, or more.
type wish struct {
	setting, value string
	atLeast        bool
}

// Useless is a setting that articles name, and that is left alone.
type Useless struct {
	// Setting is its name, or several with the same reason.
	Setting string
	// Why says what it does, or no longer does, and who should touch it when.
	Why string
	// Source is where that is written.
	Source string
}

// Facts are what was read of a machine.
type Facts struct {
	// CPUs is how many processors there are; Memory is in bytes.
	CPUs   int
	Memory uint64
	// Speed is that of the fastest network card in bits a second, 0 if none tells.
	Speed uint64
	// NodePorts is the range of Services' node ports, "30000-32767".
	NodePorts string
	// KubeProxy is the process that is one, in the node's namespace; 0 if none is.
	KubeProxy int
	// Proxy is the configuration of the cluster's kube-proxy, nil where none was asked for.
	Proxy *ProxyConfig
	// Neighbours are the entries of the neighbour tables of IPv4 and IPv6.
	Neighbours [2]int
	// Spaces are the namespaces that are looked at; the node's own first, where it is
	// among them.
	Spaces []*Space
	// Elsewhere is what doctor's checks saw in namespaces that are not looked at.
	Elsewhere []Sight
}

// ProxyConfig is the configuration of a cluster's kube-proxy.
type ProxyConfig struct {
	// Name is the object that it is in: "ConfigMap kube-system/kube-proxy".
	Name string
	// Values are fields as they are written there, by paths such as "conntrack.min"; ""
	// for one that is not. Unread is why not, for all of them.
	Values map[string]string
	Unread error
	// Conntrack is what it asks for, with kube-proxy's own values where it says nothing.
	Conntrack model.Conntrack
	// Owner is who would put it back, "" for nobody, and Where it is to be changed then.
	Owner, Where string
	// Found is what doctor's checks saw in the cluster, by their IDs.
	Found map[string][]string
	// Restart is the command by which kube-proxies read it again.
	Restart string
}

// Sight is what a check of doctor's saw in a namespace.
type Sight struct{ Check, Space, Value string }

// Space is what was read of a network namespace.
type Space struct {
	// Name is "node", "pod web-7f", or another that a person can find it by.
	Name string
	// Node says that it is the node's own; Pod, that it is a pod's.
	Node, Pod bool
	// Values are the settings that could be read, Unread why others could not.
	Values map[string]string
	Unread map[string]error
	// Fresh are those of a namespace that was just made: the kernel's own.
	Fresh map[string]string
	// Files are lines of sysctl.d(5), and of a tuned that runs, about settings, for the
	// node: file and value.
	Files map[string][][2]string
	// Held are who has set what of it: an agent, or this tool earlier.
	Held map[string]Holding
	// Found is what doctor's checks saw here, by their IDs.
	Found map[string][]string
	// Accepted is how many TCP connections came in a second, with those that found no
	// room; Datagrams how many of UDP.
	Accepted, Datagrams float64
	// RTT is the longest round trip of an open connection, in milliseconds.
	RTT float64
	// Backlogs are those of the sockets that listen, by their ports.
	Backlogs map[uint16]uint32
	// Tracked is the number of entries of connection tracking.
	Tracked int
	// Devices are the network devices, without loopback.
	Devices []Gear
}

// Holding is who has set a setting, and to what.
type Holding struct {
	Owner, Wrote string
	// Ours says that it was this tool; Again, that it sets it again whatever somebody else
	// has made of it; Theirs, that a person said so to it, and it is not for who plans now.
	Ours, Again, Theirs bool
}

// Gear is a network device, as far as it can be tuned.
type Gear struct {
	Name          string
	Hardware      bool
	Receive, Send int
	// Channels and Ring are the most that it can have, 0 if that is not known.
	Channels, Ring int
}

// Find is the knob that a person names by its ID, or by one of its settings, or by a
// check of doctor's that it answers.
func Find(name string) (*Knob, error) {
	byID := slices.IndexFunc(Knobs, func(k *Knob) bool { return k.ID == name })
	if byID >= 0 {
		return Knobs[byID], nil
	}
	for _, k := range Knobs {
		if slices.Contains(k.Settings, name) || slices.ContainsFunc(k.Checks, func(c string) bool { return strings.EqualFold(c, name) }) {
			return k, nil
		}
	}
	if why := useless(name); why != "" {
		return nil, errors.New(why)
	}
	return nil, fmt.Errorf("nothing that can be tuned is called %q: docs/tune.md lists what can, and what is useless", name)
}

// useless says why a setting is left alone, "" if it is not one of these.
func useless(name string) string {
	for _, u := range Uselesses {
		for s := range strings.SplitSeq(u.Setting, ", ") {
			if s == name || strings.HasSuffix(s, "."+name) || strings.HasSuffix(s, "/"+name) {
				return fmt.Sprintf("%s is left alone: %s (%s)", s, u.Why, u.Source)
			}
		}
	}
	return ""
}

// ParseProfile reads the name of a profile.
func ParseProfile(word string) (Profile, error) {
	if p := Profile(word); slices.Contains(Profiles, p) {
		return p, nil
	}
	return "", fmt.Errorf("%q is no profile: use latency, throughput or many-connections, or the path of a file in the form of sysctl.d(5): ./NAME", word)
}

// Of are the knobs of a profile.
func (p Profile) Of() (knobs []*Knob) {
	for _, k := range Knobs {
		if slices.Contains(k.Profiles, p) {
			knobs = append(knobs, k)
		}
	}
	return knobs
}

// beside are settings that are read to compute others.
var beside = []string{available, backlogTime}

// Names are all settings that are read of a namespace; those of devices are made by
// DeviceNames.
func Names() (names []string) {
	names = append(names, beside...)
	for _, k := range Knobs {
		if k.Scope != Device && k.Scope != Proxy {
			names = append(names, k.Settings...)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// DeviceNames are the settings of a device.
func DeviceNames(g Gear) (names []string) {
	names = append(names, g.Name+"/qdisc", g.Name+"/ring/rx", g.Name+"/channels")
	for i := range g.Receive {
		names = append(names, fmt.Sprintf("%s/rx-%d/rps_cpus", g.Name, i))
	}
	for i := range g.Send {
		names = append(names, fmt.Sprintf("%s/tx-%d/xps_cpus", g.Name, i))
	}
	return names
}
