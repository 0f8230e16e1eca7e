package doctor

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// process is what is known of one without asking more than its folder.
type process struct{ id, command string }

// sandboxes are programs whose namespace is only the outside of a pod: its sockets are
// in a kernel of its own. Kata's virtual machines, and gVisor.
var sandboxes = []string{"qemu-system", "cloud-hyperviso", "firecracker", "runsc-sandbox"}

// find lists the network namespaces, the node's own first. Where the process is not in
// that which the host began with, as in the lab, the rest of the host is not its
// node's: only namespaces with a device pair to it count.
func (h *Host) find(f *Facts) error {
	home, err := h.inode("self")
	if err != nil {
		return fmt.Errorf("find network namespaces: %w: is /proc mounted?", err)
	}
	f.Spaces = []*Space{{Name: "node", inode: home}}
	f.commands = map[string][]int{}
	known := map[uint64]*Space{home: f.Spaces[0]}
	refused := 0
	for _, id := range h.processes() {
		p := process{id, h.command(id)}
		number, _ := strconv.Atoi(id)
		f.commands[p.command] = append(f.commands[p.command], number)
		inode, err := h.inode(id)
		if errors.Is(err, fs.ErrPermission) {
			refused++
		}
		if err != nil || p.command == "" {
			continue // it ended, or is not ours to look into
		}
		s := known[inode]
		if s == nil {
			s = &Space{inode: inode, path: filepath.Join(h.root, "proc", id, "ns/net")}
			known[inode] = s
			f.Spaces = append(f.Spaces, s)
		}
		s.processes = append(s.processes, p)
	}
	places := h.mounted()
	for inode, place := range places {
		if known[inode] == nil {
			f.Spaces = append(f.Spaces, &Space{inode: inode, path: place})
		}
	}
	h.leaveStrangers(f, home)
	h.fromNode(func() {
		h.name(f, places)
		f.Spaces[0].budgets = h.budgets(f)
	})
	setAside(f)
	if err := h.privileged(); err != nil {
		f.hide(err.Error())
		f.Spaces = f.Spaces[:1]
	} else if refused > 0 {
		// A few of another user namespace, or with more capabilities than this process.
		f.Unseen = append(f.Unseen, fmt.Sprintf("processes whose network namespace this one may not look at: %d", refused))
	}
	if h.command("2") != "kthreadd" && !f.isNode() {
		f.hide("processes outside this container: run it in the host's process namespace (hostPID: true)")
	}
	f.nodePorts = h.nodePorts(f)
	return nil
}

// isNode says that a kubelet is seen: then what is beside it is the node, also where
// that is itself a container, as kind's are.
func (f *Facts) isNode() bool {
	return slices.ContainsFunc(kubelets, func(name string) bool { return len(f.commands[name]) > 0 })
}

// leaveStrangers takes out what is not this node's, where the host has several. Kernel
// threads are in the namespace that the host began with; a node that has processes of its
// own, as kind's have, sees none of them.
func (h *Host) leaveStrangers(f *Facts, home uint64) {
	first, err := h.inode("2")
	if h.command("2") == "kthreadd" && (err != nil || first == home) {
		return
	}
	f.nested = true
	f.Spaces = slices.DeleteFunc(f.Spaces, func(s *Space) bool { return s.inode != home && !h.joined(s) })
}

// setAside takes out the namespaces of virtual machines, and says so.
func setAside(f *Facts) {
	f.Spaces = slices.DeleteFunc(f.Spaces, func(s *Space) bool {
		at := slices.IndexFunc(s.processes, func(p process) bool {
			return slices.ContainsFunc(sandboxes, func(name string) bool { return strings.HasPrefix(p.command, name) })
		})
		if at < 0 || s == f.Spaces[0] {
			return false
		}
		f.Unseen = append(f.Unseen, fmt.Sprintf("%s: its sockets are in the kernel of %s", s.Name, s.processes[at].command))
		return true
	})
}

func (h *Host) joined(s *Space) (joined bool) {
	h.within(s, func(root string) error {
		devices, home, err := h.devices(root)
		for _, d := range devices {
			joined = joined || d.PeerElsewhere && d.PeerNamespace == home && home >= 0
		}
		return err
	})
	return joined
}

// processes are the numbers of those that there are, the oldest first: a pod's first
// process is the one that holds its namespace.
func (h *Host) processes() (ids []string) {
	entries, _ := os.ReadDir(filepath.Join(h.root, "proc")) // find has read from it already
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err == nil {
			ids = append(ids, e.Name())
		}
	}
	slices.SortFunc(ids, func(a, b string) int { return cmp.Or(cmp.Compare(len(a), len(b)), cmp.Compare(a, b)) })
	return ids
}

func (h *Host) inode(id string) (uint64, error) {
	to, err := os.Readlink(filepath.Join(h.root, "proc", id, "ns/net"))
	return inodeOf(to), err
}

// inodeOf reads "net:[4026531840]"; 0 for anything else.
func inodeOf(name string) (inode uint64) {
	fmt.Sscanf(name, "net:[%d]", &inode)
	return inode
}

func (h *Host) command(id string) string {
	comm, _ := os.ReadFile(filepath.Join(h.root, "proc", id, "comm"))
	return harmless(strings.TrimSpace(string(comm)))
}

// Harmless is what somebody else has written, for a terminal.
func Harmless(text string) string { return harmless(text) }

// harmless is a name that a process chose, for a terminal.
func harmless(name string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, name)
}

// name gives the namespaces names that a person can find them by, each another.
func (h *Host) name(f *Facts, places map[uint64]string) {
	node, _ := os.ReadFile(filepath.Join(h.root, "proc/sys/kernel/hostname"))
	taken := map[string]bool{}
	for _, s := range f.Spaces[1:] {
		s.pod = h.pod(s, strings.TrimSpace(string(node)))
		place := places[s.inode]
		switch {
		case s.pod != "":
			s.Name = "pod " + s.pod
		case place != "":
			s.Name = "namespace " + harmless(filepath.Base(place))
		default:
			s.Name = fmt.Sprintf("pid %s (%s)", s.processes[0].id, s.processes[0].command)
		}
		if taken[s.Name] {
			s.Name += fmt.Sprintf(" (net:[%d])", s.inode)
		}
		taken[s.Name] = true
	}
	slices.SortFunc(f.Spaces[1:], func(a, b *Space) int { return strings.Compare(a.Name, b.Name) })
}

// pod is the name of the pod whose namespace it is: its containers have it as their host
// name. Only the API knows its Kubernetes namespace.
func (h *Host) pod(s *Space, node string) string {
	for _, p := range s.processes {
		cgroup, _ := os.ReadFile(filepath.Join(h.root, "proc", p.id, "cgroup"))
		if !strings.Contains(string(cgroup), "kubepods") {
			continue
		}
		name, err := readBounded(filepath.Join(h.root, "proc", p.id, "root"), "etc/hostname")
		if name = strings.TrimSpace(name); err == nil && name != node && plain(name) {
			return name
		}
	}
	return ""
}

// plain says that a name is one of DNS: a pod writes it, and a person's terminal shows it.
func plain(name string) bool {
	return name != "" && len(name) < 254 && strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789.-") == ""
}

// networkers are processes for whose turn others' packets or names wait; the kernel
// keeps 15 characters of a name.
var networkers = []string{
	"coredns", "node-cache", "dnsmasq", "unbound", "kube-proxy", "cilium-agent", "calico-node", "flanneld",
	"nginx", "nginx-ingress-c", "envoy", "cilium-envoy", "haproxy", "traefik",
}

// budgets find the cpu.stat of those processes, in cgroups of either version.
func (h *Host) budgets(f *Facts) (all []budget) {
	seen := map[string]bool{}
	for _, command := range networkers {
		for _, id := range f.commands[command] {
			text, _ := os.ReadFile(filepath.Join(h.root, "proc", strconv.Itoa(id), "cgroup")) // it may have ended
			if file := cpuStatOf(string(text)); file != "" && !seen[file] {
				seen[file] = true
				all = append(all, budget{fmt.Sprintf("%s (pid %d)", command, id), file})
			}
		}
	}
	return all
}

// cpuStatOf reads /proc/PID/cgroup (cgroups(7)): where the controller cpu has a hierarchy
// of its own, that is version 1.
func cpuStatOf(text string) (file string) {
	for line := range strings.Lines(text) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		switch {
		case len(parts) < 3:
		case slices.Contains(strings.Split(parts[1], ","), "cpu"):
			return filepath.Join("/sys/fs/cgroup", parts[1], parts[2], "cpu.stat")
		case parts[1] == "":
			file = filepath.Join("/sys/fs/cgroup", parts[2], "cpu.stat")
		}
	}
	return file
}

// nodePorts is what a kube-apiserver of this node was told.
func (h *Host) nodePorts(f *Facts) string {
	for _, id := range f.commands["kube-apiserver"] {
		line, _ := os.ReadFile(filepath.Join(h.root, "proc", strconv.Itoa(id), "cmdline"))
		for word := range strings.SplitSeq(string(line), "\x00") {
			if given, ok := strings.CutPrefix(word, "--service-node-port-range="); ok {
				return given
			}
		}
	}
	return ""
}
