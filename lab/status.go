package lab

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/millrace/millrace/model"
)

// Status is a lab at one moment.
type Status struct {
	Name   string `json:"name"`
	Folder string `json:"folder"`
	Pid    int    `json:"pid"`
	// Up: it has come up; before, and while it ends, parts are missing.
	Up bool `json:"up"`
	// Revision grows with every change of anything below.
	Revision uint64          `json:"revision"`
	Ranges   Ranges          `json:"ranges"`
	Nodes    []NodeStatus    `json:"nodes"`
	Pods     []PodStatus     `json:"pods"`
	Services []ServiceStatus `json:"services"`
	// Problems are those of the manifests and those of the lab itself.
	Problems []model.Problem `json:"problems"`
	// Ignored counts the objects of the manifests that nobody reads, by kind.
	Ignored map[string]int `json:"ignored,omitempty"`
}

// NodeStatus is one node.
type NodeStatus struct {
	NodeInfo
	Addresses []netip.Addr   `json:"addresses"`
	PodCIDRs  []netip.Prefix `json:"pod_cidrs"`
	// Agent is nil in a lab without agents.
	Agent *AgentStatus `json:"agent,omitempty"`
}

// AgentStatus is a node's agent.
type AgentStatus struct {
	Pid      int  `json:"pid"`
	Ready    bool `json:"ready"`
	Restarts int  `json:"restarts"`
}

// PodStatus is one pod.
type PodStatus struct {
	Namespace string       `json:"namespace"`
	Name      string       `json:"name"`
	Workload  string       `json:"workload,omitempty"` // "Kind namespace/name"
	Node      string       `json:"node"`
	Addresses []netip.Addr `json:"addresses"`
	Ports     []string     `json:"ports"` // "80/tcp"
	Ready     bool         `json:"ready"`
	// Terminating: it gets no new connections and will go.
	Terminating bool `json:"terminating"`
	// Pid is 0 while no process runs.
	Pid      int    `json:"pid"`
	Restarts int    `json:"restarts"`
	Netns    string `json:"netns"`
	Cgroup   string `json:"cgroup"`
	// Socket takes client work (Client.Call and Client.Load).
	Socket string `json:"socket"`
}

// String is "namespace/name".
func (p PodStatus) String() string { return p.Namespace + "/" + p.Name }

// ServiceStatus is one Service as it was last published.
type ServiceStatus struct {
	Namespace  string       `json:"namespace"`
	Name       string       `json:"name"`
	Type       string       `json:"type"`
	Headless   bool         `json:"headless,omitempty"`
	ClusterIPs []netip.Addr `json:"cluster_ips"`
	Ports      []PortStatus `json:"ports"`
}

// PortStatus is one port of a Service.
type PortStatus struct {
	Name      string           `json:"name,omitempty"`
	Protocol  model.Protocol   `json:"protocol"`
	Port      uint16           `json:"port"`
	Endpoints []EndpointStatus `json:"endpoints"`
}

// EndpointStatus is one endpoint, with the conditions of an EndpointSlice.
type EndpointStatus struct {
	Address     netip.AddrPort `json:"address"`
	Pod         string         `json:"pod,omitempty"`
	Node        string         `json:"node,omitempty"`
	Ready       bool           `json:"ready"`
	Serving     bool           `json:"serving"`
	Terminating bool           `json:"terminating"`
}

// Pod finds a pod by "namespace/name", by its name in the namespace default,
// or by the beginning of either where only one pod begins so.
func (s *Status) Pod(name string) (*PodStatus, error) {
	var found []*PodStatus
	for i := range s.Pods {
		p := &s.Pods[i]
		if p.String() == name || p.Namespace == "default" && p.Name == name {
			return p, nil
		}
		if strings.HasPrefix(p.String(), name) || strings.HasPrefix(p.Name, name) {
			found = append(found, p)
		}
	}
	switch len(found) {
	case 0:
		return nil, fmt.Errorf("find pod %q: lab %s has none of that name", name, s.Name)
	case 1:
		return found[0], nil
	}
	names := make([]string, min(len(found), 5))
	for i := range names {
		names[i] = found[i].String()
	}
	return nil, fmt.Errorf("find pod %q: %d pods begin so, such as %s: write more of the name", name, len(found), strings.Join(names, ", "))
}

// Node finds a node by its name; nil if there is none.
func (s *Status) Node(name string) *NodeStatus {
	i := slices.IndexFunc(s.Nodes, func(n NodeStatus) bool { return n.Node == name })
	if i < 0 {
		return nil
	}
	return &s.Nodes[i]
}

// Service finds a Service by "namespace/name" or by its name in the namespace
// default; nil if there is none.
func (s *Status) Service(name string) *ServiceStatus {
	i := slices.IndexFunc(s.Services, func(v ServiceStatus) bool {
		return v.Namespace+"/"+v.Name == name || v.Namespace == "default" && v.Name == name
	})
	if i < 0 {
		return nil
	}
	return &s.Services[i]
}

// status pictures the lab. The lock is held.
func (c *cluster) status(pid int) *Status {
	s := &Status{
		Name: c.cfg.Name, Folder: c.paths.folder, Pid: pid, Up: c.up,
		Revision: c.revision, Ranges: c.ranges,
		Nodes: []NodeStatus{}, Pods: []PodStatus{}, Services: []ServiceStatus{}, Problems: []model.Problem{},
	}
	for i, n := range c.nodes {
		status := NodeStatus{NodeInfo: n.info, Addresses: n.Addresses, PodCIDRs: n.PodCIDRs}
		if a := c.agents[i]; c.cfg.AgentCommand != nil {
			status.Agent = &AgentStatus{a.pid, a.ready, a.restarts}
		}
		s.Nodes = append(s.Nodes, status)
	}
	for _, name := range sortedNames(c.pods) {
		s.Pods = append(s.Pods, c.podStatus(c.pods[name]))
	}
	for _, service := range c.services {
		s.Services = append(s.Services, serviceStatus(service))
	}
	if c.wishes != nil {
		s.Problems = append(s.Problems, c.wishes.Problems...)
		s.Ignored = c.wishes.Ignored
	}
	s.Problems = append(s.Problems, c.planned...)
	for _, object := range sortedKeys(c.happened) {
		s.Problems = append(s.Problems, c.happened[object])
	}
	return s
}

func (c *cluster) podStatus(p *pod) PodStatus {
	at := c.place(p)
	status := PodStatus{
		Namespace: p.Pod.Namespace, Name: p.Pod.Name.Name, Workload: p.Owner,
		Node: p.Pod.Node, Addresses: p.Pod.Addresses, Ports: []string{},
		Ready: p.Ready && !p.Leaving, Terminating: p.Leaving,
		Pid: p.pid, Restarts: p.restarts,
		Netns: at.netns, Cgroup: at.cgroup, Socket: at.socket,
	}
	for _, port := range p.Pod.Ports {
		status.Ports = append(status.Ports, fmt.Sprintf("%d/%s", port.Port, port.Protocol))
	}
	return status
}

func serviceStatus(s *model.Service) ServiceStatus {
	status := ServiceStatus{
		Namespace: s.Namespace, Name: s.Name.Name, Type: string(s.Type), Headless: s.Headless,
		ClusterIPs: s.ClusterIPs, Ports: []PortStatus{},
	}
	for _, port := range s.Ports {
		p := PortStatus{Name: port.Name, Protocol: port.Protocol, Port: port.Port, Endpoints: []EndpointStatus{}}
		for _, b := range port.Backends {
			e := EndpointStatus{Address: b.Address, Node: b.Node, Ready: b.Ready, Serving: b.Serving, Terminating: b.Terminating}
			if b.Pod != (model.Name{}) {
				e.Pod = b.Pod.String()
			}
			p.Endpoints = append(p.Endpoints, e)
		}
		status.Ports = append(status.Ports, p)
	}
	return status
}

// statusPatience is how long a question for a newer status may wait.
const statusPatience = 10 * time.Second
