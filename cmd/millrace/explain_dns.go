package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/kernel/link"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/kernel/resolv"
	"github.com/millrace/millrace/layer/dns"
)

func explainDNSCommand(s *settings) *cobra.Command {
	var at place
	var from wishes
	var really bool
	c := command(&cobra.Command{
		Use:   "dns POD NAME",
		Short: "Which queries a pod sends for a name, who answers each, and what",
		Long: `
Follows the resolvers of glibc, musl and Go through the pod's own resolv.conf, and asks
the program in force what becomes of each query: answered in the kernel, by the agent, or
by the cluster's DNS servers. It sends nothing. POD is a pod of this node, NAMESPACE/NAME or
its address; names come from the agent, or with --source from the cluster. Where the layer
is off, and beside any other cluster, it says what a lookup costs there. As in
  millrace explain dns shop/web-1 api.example.com
  millrace explain dns 10.244.1.4 web.other --prove
Needs CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON, CAP_SYS_ADMIN and CAP_SYS_PTRACE.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 2 {
				return usage("say POD NAME, as in `millrace explain dns shop/web-1 api.example.com`")
			}
			return nil
		},
	}, readsOnly, func(ctx context.Context, args []string) error {
		if !isLookedUp(args[1]) {
			return usage("%q is no name that can be looked up: write one such as api.example.com", args[1])
		}
		e, err := explainDNS(ctx, &at, &from, args[0], args[1], really)
		if err != nil {
			return err
		}
		if s.json() {
			return printJSON(e)
		}
		return e.print(really)
	}, exitData, exitUnavailable, exitPrivilege)
	at.flagPins(c)
	at.flagRun(c)
	from.flagsAs(c, "take the names of pods from this cluster, not from the agent: "+sourceForms)
	c.Flags().BoolVar(&really, "prove", false, "send each query from the pod, some times: what is answered, and how fast")
	return c
}

// isLookedUp says whether a resolver takes a name (RFC 1035, 2.3.4).
func isLookedUp(name string) bool {
	name = strings.TrimSuffix(name, ".")
	if name == "" || len(name) > 253 {
		return false
	}
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || len(label) > 63 || strings.ContainsAny(label, " \t\n\x00") {
			return false
		}
	}
	return true
}

// lookupExplained is what `explain dns` says.
type lookupExplained struct {
	Pod     string     `json:"pod"`
	Name    string     `json:"name"`
	Address netip.Addr `json:"address"`
	// Device is the pod's at the node.
	Device  string       `json:"device"`
	Servers []netip.Addr `json:"servers"`
	Search  []string     `json:"search"`
	Ndots   int          `json:"ndots"`
	// On says that the layer answers on this node.
	On      bool         `json:"on"`
	Lookups []dns.Lookup `json:"lookups"`
	// Notes are sentences to read with it.
	Notes []string `json:"notes"`
}

func explainDNS(ctx context.Context, at *place, from *wishes, who, name string, really bool) (*lookupExplained, error) {
	pod, device, err := findPod(ctx, at, from, who)
	if err != nil {
		return nil, err
	}
	e := &lookupExplained{Pod: who, Name: name, Address: pod.Address, Device: device, Servers: pod.Conf.Servers, Search: pod.Conf.Search, Ndots: pod.Conf.Ndots, Notes: []string{}}
	explainer, err := dns.OpenExplainer(dns.Settings{Zone: zoneFor(ctx, at, pod.Conf), Pins: filepath.Join(at.pins, "dns")})
	switch {
	case dns.IsOff(err):
		e.Notes = append(e.Notes, "names are not answered on this node: `millrace agent --dns` does that")
	case err != nil:
		return nil, err
	default:
		defer explainer.Close()
		e.On = true
	}
	if e.Lookups, err = explainer.Explain(pod, name, really); err != nil {
		return nil, fmt.Errorf("explain the lookup of %s by %s: %w", name, who, err)
	}
	if len(e.Servers) > 1 {
		e.Notes = append(e.Notes, fmt.Sprintf("musl asks all %d name servers at once; glibc and Go the first, and another one when it does not answer", len(e.Servers)))
	}
	return e, nil
}

// zoneFor is the zone that the agent answers for, or where there is none the one that
// kubelet has put into the pod's search list.
func zoneFor(ctx context.Context, at *place, conf resolv.Conf) string {
	var status agent.Status
	_ = agent.Ask(ctx, at.run, "/status", &status) // without an agent the list says it
	for _, l := range status.Layers {
		if zone := l.Settings["zone"]; l.Name == at.names().Name() && zone != "" {
			return zone
		}
	}
	for _, suffix := range conf.Search {
		if zone, found := strings.CutPrefix(suffix, "svc."); found {
			return zone
		}
	}
	return "cluster.local"
}

// findPod finds a pod's network namespace, its device at the node, and its resolv.conf.
func findPod(ctx context.Context, at *place, from *wishes, who string) (pod dns.Pod, device string, err error) {
	addresses := []netip.Addr{}
	if addr, err := netip.ParseAddr(who); err == nil {
		addresses = append(addresses, addr.Unmap())
	} else {
		known, err := readNames(ctx, at, from)
		if err != nil {
			return pod, "", err
		}
		for addr, name := range known.pods {
			if name == who {
				addresses = append(addresses, addr)
			}
		}
		if len(addresses) == 0 {
			return pod, "", &failure{exitData, fmt.Errorf("pod %s is not known: say NAMESPACE/NAME where an agent runs or with --source kube:, or the pod's address", who)}
		}
		slices.SortFunc(addresses, netip.Addr.Compare)
	}
	spaces, refused := netns.Spaces("")
	for _, space := range spaces {
		for _, addr := range addresses {
			if slices.Contains(space.Addresses, addr) {
				pod.Address, pod.Netns = addr, space.Path
			}
		}
	}
	if pod.Netns == "" {
		return pod, "", errors.Join(&failure{exitData, fmt.Errorf("pod %s (%s) is not on this node, or uses the node's network: ask on its node; of the node itself %s", who, addresses[0], ofNode(at))}, refused)
	}
	number, err := numberOf(pod.Netns)
	if err != nil {
		return pod, "", err
	}
	views, err := (&resolv.Reader{}).Views("")
	if err != nil {
		return pod, "", err
	}
	view := views[number]
	switch {
	case view.Err != nil:
		return pod, "", &failure{exitData, fmt.Errorf("resolv.conf of pod %s: %w", who, view.Err)}
	case !view.Found:
		return pod, "", &failure{exitData, fmt.Errorf("pod %s has no process that sees a resolv.conf", who)}
	}
	pod.Conf = view.Conf
	pod.Device, device, err = deviceOf(number)
	return pod, device, err
}

// ofNode says what becomes of the node's own queries: no program follows these.
func ofNode(at *place) string {
	if found, err := at.nodeNames().Look(); err == nil && found.Len() > 0 {
		return "what it asks the DNS Service the agent answers, see `millrace show queries`, FROM node"
	}
	return "all it asks goes to its DNS servers"
}

// numberOf is how this network namespace calls another.
func numberOf(path string) (int, error) {
	file, err := os.Open(path)
	if err != nil {
		return 0, fmt.Errorf("open namespace: %w", err)
	}
	defer file.Close()
	return netns.Number(int(file.Fd()))
}

// deviceOf is the node's device that leads to a network namespace; none if a pod has its
// own otherwise (a bridge's port, a part of a device).
func deviceOf(number int) (index int, name string, err error) {
	n, err := link.Open("")
	if err != nil {
		return 0, "", err
	}
	defer n.Close()
	devices, err := n.Devices()
	for _, d := range devices {
		if d.PeerElsewhere && d.PeerNamespace == number {
			return d.Index, d.Name, err
		}
	}
	return 0, "", err
}

func (e *lookupExplained) print(really bool) error {
	fmt.Printf("%s (%s, %s) asks %s; search %s, ndots %d\n", e.Pod, e.Address, orDash(e.Device), joinAddresses(e.Servers), orDash(strings.Join(e.Search, " ")), e.Ndots)
	for _, l := range e.Lookups {
		fmt.Printf("\n%s: %s\n", strings.Join(l.Resolvers, ", "), bold(l.Sum()))
		heading := []string{"QUERY", "TYPE", "BY", "ANSWER", "OF"}
		if really {
			heading = append(heading, "TOOK")
		}
		t := newTable(os.Stdout, heading...)
		for _, q := range l.Queries {
			cells := []string{q.Name, q.Type, q.By, q.Answer.String(), orDash(q.From)}
			if really {
				cells = append(cells, fmt.Sprint(q.Took.Round(100*time.Nanosecond)))
			}
			t.row(cells...)
		}
		if err := t.print(); err != nil {
			return err
		}
	}
	for _, note := range e.Notes {
		fmt.Printf("\n%s\n", note)
	}
	return nil
}

func joinAddresses(all []netip.Addr) string {
	var words []string
	for _, addr := range all {
		words = append(words, addr.String())
	}
	return strings.Join(words, ", ")
}
