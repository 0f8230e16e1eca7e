package service

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/tools/txtar"

	"github.com/millrace/millrace/model"
)

// flowStory is a cluster and what kube-proxy's own tests say of packets in it, seen
// from the only Node among its objects.
type flowStory struct {
	name string
	// manifests are the objects, one JSON document after the other.
	manifests []byte
	// nodePortAddresses are the ranges in which a node's address has to be to have
	// node ports; nil for any.
	nodePortAddresses []netip.Prefix
	// nodes are where the endpoints are.
	nodes map[netip.Addr]string
	rows  []flowRow
}

// flowRow is one packet that begins a flow.
type flowRow struct {
	name     string
	source   netip.Addr
	protocol model.Protocol
	to       netip.AddrPort
	// want is what kube-proxy does.
	want flowEnd
	// here is what is done here instead and why; nil where it is the same.
	here *flowEnd
	why  string
}

// flowEnd is what becomes of a flow.
type flowEnd struct {
	// verdict is "refused", "dropped", "not-a-service", "accepted", or empty where
	// there are endpoints.
	verdict     string
	endpoints   []netip.AddrPort
	masqueraded bool
}

func (e flowEnd) String() string {
	text := e.verdict
	if text == "" {
		text = strings.Trim(fmt.Sprint(e.endpoints), "[]")
	}
	if e.masqueraded {
		text += " masqueraded"
	}
	return text
}

// readFlowStories reads a file of testdata/kube-proxy, whose head says how it is
// written.
func readFlowStories(path string) ([]flowStory, error) {
	archive, err := txtar.ParseFile(path)
	if err != nil {
		return nil, err
	}
	reasons := map[string]string{}
	for line := range strings.Lines(string(archive.Comment)) {
		if rest, ok := strings.CutPrefix(strings.TrimSpace(line), "reason "); ok {
			key, text, _ := strings.Cut(rest, ": ")
			reasons[key] = text
		}
	}
	var stories []flowStory
	sections := map[string][]byte{}
	for _, f := range archive.Files {
		sections[f.Name] = f.Data
		name, ok := strings.CutSuffix(f.Name, "/flows")
		if !ok {
			continue
		}
		story := flowStory{name: name, manifests: slices.Concat(sections["node.json"], sections[name+"/objects.json"])}
		if err := story.readFlows(string(f.Data), reasons); err != nil {
			return nil, fmt.Errorf("read %s: %s: %w", path, name, err)
		}
		stories = append(stories, story)
	}
	return stories, nil
}

func (s *flowStory) readFlows(text string, reasons map[string]string) error {
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "#") {
			continue
		}
		if ranges, ok := strings.CutPrefix(line, "node-port-addresses "); ok {
			for _, r := range strings.Fields(ranges) {
				p, err := netip.ParsePrefix(r)
				if err != nil {
					return err
				}
				s.nodePortAddresses = append(s.nodePortAddresses, p)
			}
			continue
		}
		row, err := readFlow(line, reasons)
		if err != nil {
			return fmt.Errorf("%q: %w", line, err)
		}
		s.rows = append(s.rows, row)
	}
	return nil
}

func readFlow(line string, reasons map[string]string) (row flowRow, err error) {
	parts := strings.Split(line, " | ")
	if len(parts) != 2 && len(parts) != 4 {
		return row, errors.New("a flow has two parts, or four")
	}
	packet, end, ok := strings.Cut(parts[1], " -> ")
	words := strings.Fields(packet)
	if !ok || len(words) != 3 {
		return row, errors.New("a packet is SOURCE PROTOCOL DESTINATION -> what becomes of it")
	}
	row.name = parts[0]
	var failures [5]error
	row.source, failures[0] = netip.ParseAddr(words[0])
	row.protocol, failures[1] = model.ParseProtocol(words[1])
	row.to, failures[2] = netip.ParseAddrPort(words[2])
	row.want, failures[3] = readFlowEnd(end)
	if len(parts) == 4 {
		var here flowEnd
		here, failures[4] = readFlowEnd(strings.TrimPrefix(parts[2], "here "))
		if row.here, row.why = &here, reasons[parts[3]]; row.why == "" {
			return row, fmt.Errorf("reason %q is not explained", parts[3])
		}
	}
	return row, errors.Join(failures[:]...)
}

func readFlowEnd(text string) (end flowEnd, err error) {
	text, end.masqueraded = strings.CutSuffix(text, " masqueraded")
	if slices.Contains([]string{"refused", "dropped", "not-a-service", "accepted"}, text) {
		end.verdict = text
		return end, nil
	}
	for _, word := range strings.Fields(text) {
		e, err := netip.ParseAddrPort(word)
		if err != nil {
			return end, err
		}
		end.endpoints = append(end.endpoints, e)
	}
	slices.SortFunc(end.endpoints, netip.AddrPort.Compare)
	return end, nil
}

// manifest is what the stories' objects say, of any kind.
type manifest struct {
	Kind     string
	Metadata struct {
		Name, Namespace string
		Labels          map[string]string
	}
	Spec struct {
		Type, ClusterIP, ExternalTrafficPolicy, InternalTrafficPolicy string
		ExternalIPs                                                   []netip.Addr
		LoadBalancerSourceRanges                                      []string
		PodCIDRs                                                      []netip.Prefix
		Ports                                                         []struct {
			Name, Protocol string
			Port, NodePort uint16
		}
	}
	Status struct {
		Addresses    []struct{ Address netip.Addr }
		LoadBalancer struct{ Ingress []struct{ IP netip.Addr } }
	}
	Ports []struct {
		Name, Protocol string
		Port           uint16
	}
	Endpoints []struct {
		Addresses  []netip.Addr
		NodeName   string
		Conditions struct{ Ready, Serving, Terminating *bool }
		Hints      struct{ ForNodes, ForZones []struct{ Name string } }
	}
}

// snapshot reads the manifests of a story. It is no source: it takes what kube-proxy's
// tests use, as it stands there.
func (s *flowStory) snapshot() (*model.Snapshot, error) {
	snapshot := &model.Snapshot{Number: 1, Complete: true}
	s.nodes = map[netip.Addr]string{}
	services := map[model.Name]*model.Service{}
	for decoder := json.NewDecoder(bytes.NewReader(s.manifests)); ; {
		var m manifest
		if err := decoder.Decode(&m); errors.Is(err, io.EOF) {
			return snapshot, nil
		} else if err != nil {
			return nil, err
		}
		switch m.Kind {
		case "Node":
			node := &model.Node{Name: m.Metadata.Name, PodCIDRs: m.Spec.PodCIDRs, Labels: m.Metadata.Labels}
			for _, a := range m.Status.Addresses {
				node.Addresses = append(node.Addresses, a.Address)
			}
			snapshot.Nodes = append(snapshot.Nodes, node)
		case "Service":
			service, err := m.service()
			if err != nil {
				return nil, err
			}
			services[service.Name] = service
			snapshot.Services = append(snapshot.Services, service)
		case "EndpointSlice":
			for _, e := range m.Endpoints {
				s.nodes[e.Addresses[0]] = e.NodeName
			}
			m.join(services[model.Name{Namespace: m.Metadata.Namespace, Name: m.Metadata.Labels["kubernetes.io/service-name"]}])
		}
	}
}

func (m *manifest) service() (*model.Service, error) {
	clusterIP, err := netip.ParseAddr(m.Spec.ClusterIP)
	if err != nil {
		return nil, err
	}
	s := &model.Service{
		Name: model.Name{Namespace: m.Metadata.Namespace, Name: m.Metadata.Name}, Type: model.ServiceType(m.Spec.Type),
		ClusterIPs: []netip.Addr{clusterIP}, ExternalIPs: m.Spec.ExternalIPs,
		InternalLocal: m.Spec.InternalTrafficPolicy == "Local", ExternalLocal: m.Spec.ExternalTrafficPolicy == "Local",
	}
	for _, i := range m.Status.LoadBalancer.Ingress {
		s.LoadBalancerIPs = append(s.LoadBalancerIPs, i.IP)
	}
	for _, r := range m.Spec.LoadBalancerSourceRanges {
		p, err := netip.ParsePrefix(strings.TrimSpace(r))
		if err != nil {
			return nil, err
		}
		s.SourceRanges = append(s.SourceRanges, p)
	}
	for _, p := range m.Spec.Ports {
		protocol, err := model.ParseProtocol(p.Protocol)
		if err != nil {
			return nil, err
		}
		s.Ports = append(s.Ports, model.ServicePort{Name: p.Name, Protocol: protocol, Port: p.Port, NodePort: p.NodePort})
	}
	return s, nil
}

// join adds the endpoints of a slice to its Service.
func (m *manifest) join(s *model.Service) {
	for _, p := range m.Ports {
		for i := range s.Ports {
			to := &s.Ports[i]
			if protocol, _ := model.ParseProtocol(p.Protocol); to.Name != p.Name || to.Protocol != protocol {
				continue
			}
			for _, e := range m.Endpoints {
				c := e.Conditions
				ready := c.Ready == nil || *c.Ready
				to.Backends = append(to.Backends, model.Backend{
					Address: netip.AddrPortFrom(e.Addresses[0], p.Port), Node: e.NodeName, Ready: ready,
					Serving: c.Serving == nil && ready || c.Serving != nil && *c.Serving, Terminating: c.Terminating != nil && *c.Terminating,
					Hints: model.HintsFor(namesOf(e.Hints.ForNodes), namesOf(e.Hints.ForZones)),
				})
			}
		}
	}
}

func namesOf(list []struct{ Name string }) (names []string) {
	for _, e := range list {
		names = append(names, e.Name)
	}
	return names
}

// becomes says from the plan alone what becomes of a packet on node.
func (s *flowStory) becomes(f *flowRow, rows map[Frontend]*Row, node *model.Node) flowEnd {
	contains := func(a netip.Addr) func(netip.Prefix) bool { return func(p netip.Prefix) bool { return p.Contains(a) } }
	row := rows[Frontend{f.to, f.protocol}]
	hasNodePorts := (slices.Contains(node.Addresses, f.to.Addr()) || f.to.Addr() == netip.MustParseAddr("127.0.0.1")) &&
		(s.nodePortAddresses == nil || slices.ContainsFunc(s.nodePortAddresses, contains(f.to.Addr())))
	if row == nil && hasNodePorts {
		row = rows[Frontend{netip.AddrPortFrom(anyAddress(f.to.Addr().Is4()), f.to.Port()), f.protocol}]
	}
	if row == nil {
		return flowEnd{verdict: "not-a-service"}
	}
	if row.SourceRanges != nil && !slices.ContainsFunc(row.SourceRanges, contains(f.source)) {
		return flowEnd{verdict: "dropped"}
	}
	inside := f.source.IsLoopback() || slices.Contains(node.Addresses, f.source) || slices.ContainsFunc(node.PodCIDRs, contains(f.source))
	to, drops := row.Backends, row.Drops
	if !inside && row.Outside != nil {
		to, drops = row.Outside.Backends, row.Outside.Drops
	}
	switch {
	case drops:
		return flowEnd{verdict: "dropped"}
	case len(to) == 0:
		return flowEnd{verdict: "refused"}
	}
	elsewhere := func(e netip.AddrPort) bool { return s.nodes[e.Addr()] != node.Name }
	return flowEnd{endpoints: to, masqueraded: row.Masquerade && !inside && slices.ContainsFunc(to, elsewhere)}
}

// What kube-proxy's own tests say of packets is what the plan says, but for the
// rows that give a reason.
func TestPlansDoWhatKubeProxyDoes(t *testing.T) {
	files, err := filepath.Glob("testdata/kube-proxy/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no stories of kube-proxy: %v", err)
	}
	flows, others := 0, 0
	for _, path := range files {
		stories, err := readFlowStories(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, story := range stories {
			t.Run(strings.TrimSuffix(filepath.Base(path), ".txtar")+"/"+story.name, func(t *testing.T) { story.check(t) })
			flows += len(story.rows)
			for _, row := range story.rows {
				if row.here != nil {
					others++
				}
			}
		}
	}
	t.Logf("%d flows, %d of them are other than with kube-proxy", flows, others)
}

func (s *flowStory) check(t *testing.T) {
	snapshot, err := s.snapshot()
	if err != nil {
		t.Fatal(err)
	}
	node := snapshot.Nodes[0]
	rows := (&planner{}).plan(Settings{Node: node.Name}, snapshot).index()
	for _, f := range s.rows {
		want, why := f.want, "as with kube-proxy"
		if f.here != nil {
			if want, why = *f.here, f.why; want.String() == f.want.String() {
				t.Errorf("%s: is the same with kube-proxy, so that no reason is needed", f.name)
			}
		}
		if got := s.becomes(&f, rows, node); got.String() != want.String() {
			t.Errorf("%s: %s from %s to %s is %s, and should be %s: %s", f.name, f.protocol, f.source, f.to, got, want, why)
		}
	}
}
