package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"
)

const (
	// drain is millrace's own limit (docs/service.md, When an endpoint is gone), and
	// slack what a busy machine may need beside.
	drain = 30 * time.Second
	slack = 10 * time.Second
)

// excuse says why a failure is not one of the network; empty if it is.
//
// Abrupt: the endpoint was killed. Either the failed call knows its endpoint, by the
// kernel's table or because it had answered, and that died just before; or
// the call does not know, and some endpoint died just before or meanwhile.
//
// Manual: the endpoint was taken from the Service, and lives. Connected sockets are
// closed, which is what docs/service.md says: UDP at once, TCP after the drain limit.
func (c *churn) excuse(f failure) string {
	ended := f.At.Add(time.Duration(f.MS) * time.Millisecond)
	switch f.Target {
	case "abrupt":
		return c.excuseDeath(f, ended)
	case "manual":
		return c.excuseMove(f, ended)
	}
	return ""
}

func (c *churn) excuseMove(f failure, ended time.Time) string {
	if !strings.Contains(f.Error, "software caused connection abort") && !strings.Contains(f.Error, "destination address required") {
		return ""
	}
	since := time.Time{} // when it was away for an agent that was down when it came back
	for i, away := range c.away[f.Server] {
		if i == 0 || !c.someDown(c.away[f.Server][i-1].to, away.from) {
			since = away.from
		}
		switch {
		case f.Kind == "udp-long" && ended.After(away.from) && ended.Before(c.known(away.from)):
			return "a socket was told that its endpoint is not the Service's any more"
		case f.Kind == "tcp-long" && ended.After(since.Add(drain-time.Second)) && ended.Before(c.told(away.from, f)):
			return "a connection was closed after the drain limit"
		}
	}
	return ""
}

// known is when all agents know what happened at a moment: soon, but where one was down
// just then, soon after all have been ready again.
func (c *churn) known(what time.Time) time.Time { return c.done(what, what.Add(slack)) }

// done is when all agents have done what they should have done between two moments.
func (c *churn) done(from, until time.Time) time.Time {
	done := until
	for _, down := range c.down {
		if down.within(from, until) && down.to.Add(slack).After(done) {
			done = down.to.Add(slack)
		}
	}
	return done
}

// someDown says whether some agent was down between two moments.
func (c *churn) someDown(from, until time.Time) bool {
	return slices.ContainsFunc(c.down, func(down *span) bool { return down.within(from, until) })
}

// told is when a connection has been told that its endpoint went: after the drain limit,
// which begins when an agent knows it, and goes on with the next agent. A client outside
// is told when TCP sends again, which may be in twice the time.
func (c *churn) told(gone time.Time, f failure) time.Time {
	told := c.done(gone.Add(drain), c.known(gone).Add(drain))
	if f.outside {
		told = told.Add(told.Sub(f.At))
	}
	return told
}

func (c *churn) excuseDeath(f failure, ended time.Time) string {
	endpoint, _ := netip.ParseAddrPort(f.Endpoint)
	for _, d := range c.deaths {
		knows := f.Server == d.pod || slices.Contains(d.addresses, endpoint.Addr().String())
		known := c.known(d.at)
		switch {
		case !ended.After(d.at) || !f.At.Before(known) && f.Kind != "tcp-long":
		case knows && f.Kind == "tcp-long":
			if ended.Before(c.told(d.at, f)) {
				return "the connection's endpoint was killed, and it was told"
			}
		case knows:
			c.latest = max(c.latest, f.At.Sub(d.at))
			return "the call's endpoint was killed"
		case !f.At.Before(known):
		case f.Kind == "udp", f.Server == "" && (f.Endpoint == "" || f.Endpoint == f.To):
			c.latest = max(c.latest, f.At.Sub(d.at))
			return "an endpoint was killed just then, perhaps the one it had"
		}
	}
	return ""
}

// judge counts, and says what nothing excuses.
func (c *churn) judge(begun, ended time.Time) {
	// What was steered to an endpoint that is gone has been closed by now.
	time.Sleep(drain + slack)
	all, excused := said{}, map[string]int{}
	for _, from := range c.callers {
		s, err := from.listen(begun)
		c.must(err)
		all.asked, all.failed = all.asked+s.asked, all.failed+s.failed
		if s.last.SilentMS > 5000 {
			c.t.Errorf("%s: a flow is stuck, silent for %d ms: %s", from.name, s.last.SilentMS, s.last.Silent)
		}
		if s.failed != len(s.failures) {
			c.t.Errorf("%s counted %d failures, and told %d", from.name, s.failed, len(s.failures))
		}
		for _, f := range s.failures {
			why := c.excuse(f)
			if why == "" {
				c.t.Errorf("%s: %v", from.name, f)
			}
			excused[f.Target+"/"+f.Kind+": "+why]++
		}
	}
	c.t.Logf("%d calls of %d callers in %v, %d failed", all.asked, len(c.callers), time.Since(begun).Round(time.Second), all.failed)
	c.t.Logf("the last call to an endpoint that had been killed began %v after that", c.latest.Round(time.Millisecond))
	for _, why := range slices.Sorted(maps.Keys(excused)) {
		c.t.Logf("%6d %s", excused[why], why)
	}
	if c.t.Failed() {
		for _, e := range c.events {
			c.t.Logf("%s %s", e.at.Format("15:04:05.000"), e.what)
		}
	}
	c.compareTables()
}

// compareTables: each node has what the API server has, and nothing else.
func (c *churn) compareTables() {
	want := c.wantedRows()
	for _, n := range allNodes() {
		have := c.rowsOf(n)
		for at, backends := range have {
			ready, there := want[at]
			if !there {
				c.t.Errorf("%s still serves %s", n.name(), at)
			}
			for _, b := range backends {
				if !slices.Contains(ready, b) {
					c.t.Errorf("%s still leads %s to %s; it has %v", n.name(), at, b, ready)
				}
			}
			if len(ready) > 0 && len(backends) == 0 {
				c.t.Errorf("%s leads %s to nobody; it has %v", n.name(), at, ready)
			}
		}
		c.compareStatus(n, have)
		for at := range want {
			if _, there := have[at]; !there {
				c.t.Errorf("%s does not serve %s", n.name(), at)
			}
		}
	}
}

// compareStatus: what an agent counts in its maps is what the kernel shows, and nothing
// was found in the kernel that it had not put there.
func (c *churn) compareStatus(n node, rows map[string][]string) {
	var status struct {
		Ready  bool
		Layers []struct {
			Drifted  int
			Degraded []string
			Reasons  map[string]int
			Maps     []struct {
				Name    string
				Entries int
			}
		}
	}
	c.must(json.Unmarshal(c.millrace(n, "status"), &status))
	if !status.Ready || len(status.Layers) == 0 {
		c.t.Fatalf("%s: the agent is not ready: %+v", n.name(), status)
	}
	for _, l := range status.Layers {
		if l.Drifted > 0 || len(l.Degraded) > 0 {
			c.t.Errorf("%s: %d differences were found in the kernel, and %q", n.name(), l.Drifted, l.Degraded)
		}
	}
	l := status.Layers[0] // Services
	backends := 0
	for _, b := range rows {
		backends += len(b)
	}
	for _, m := range l.Maps {
		if want, known := map[string]int{"services": len(rows), "slots": backends, "backends": backends}[m.Name]; known && m.Entries != want {
			c.t.Errorf("%s: %s has %d entries, and %d are shown", n.name(), m.Name, m.Entries, want)
		}
	}
	c.t.Logf("%s: %v, %v", n.name(), l.Maps, l.Reasons)
}

// millrace asks a node, in JSON.
func (c *churn) millrace(n node, arguments ...string) []byte {
	program, err := filepath.Abs(filepath.Join(root, "dist", "millrace-"+runtime.GOARCH))
	c.must(err)
	arguments = append([]string{fmt.Sprint(int(n)), program}, append(arguments, "-o", "json")...)
	text, err := exec.Command(folder+"/node", arguments...).Output()
	if len(text) == 0 {
		c.must(err) // else a status says what is wrong
	}
	return text
}

// rowsOf a node's kernel: address, port and protocol, and the endpoints.
func (c *churn) rowsOf(n node) map[string][]string {
	var shown struct {
		Services []struct {
			Address, Protocol string
			Backends          []string
			Outside           struct{ Backends []string }
		}
	}
	c.must(json.Unmarshal(c.millrace(n, "show", "services"), &shown))
	rows := map[string][]string{}
	for _, row := range shown.Services {
		rows[row.Address+"/"+strings.ToLower(row.Protocol)] = append(row.Backends, row.Outside.Backends...)
	}
	return rows
}

// wantedRows are the addresses at which Services are to be served, and their
// endpoints that are ready, as the API server has them.
func (c *churn) wantedRows() map[string][]string {
	var services struct {
		Items []struct {
			Metadata struct{ Name, Namespace string }
			Spec     struct {
				ClusterIPs []string
				Ports      []struct {
					Name, Protocol string
					Port, NodePort int
				}
			}
		}
	}
	c.must(json.Unmarshal([]byte(kubectlOf(c.t, "get", "services", "-A", "-o", "json")), &services))
	ready := c.readyEndpoints()
	rows := map[string][]string{}
	for _, s := range services.Items {
		for _, ip := range s.Spec.ClusterIPs {
			any, family := "0.0.0.0", "IPv4"
			if strings.Contains(ip, ":") {
				any, family = "::", "IPv6"
			}
			for _, p := range s.Spec.Ports {
				backends := ready[strings.Join([]string{s.Metadata.Namespace, s.Metadata.Name, p.Name, family}, "/")]
				end := "/" + strings.ToLower(p.Protocol)
				rows[net.JoinHostPort(ip, fmt.Sprint(p.Port))+end] = backends
				if p.NodePort != 0 {
					rows[net.JoinHostPort(any, fmt.Sprint(p.NodePort))+end] = backends
				}
			}
		}
	}
	return rows
}

// readyEndpoints by namespace, Service, port and family.
func (c *churn) readyEndpoints() map[string][]string {
	var slices struct {
		Items []struct {
			AddressType string
			Metadata    struct {
				Namespace string
				Labels    map[string]string
			}
			Ports []struct {
				Name string
				Port int
			}
			Endpoints []struct {
				Addresses  []string
				Conditions struct{ Ready *bool }
			}
		}
	}
	c.must(json.Unmarshal([]byte(kubectlOf(c.t, "get", "endpointslices", "-A", "-o", "json")), &slices))
	ready := map[string][]string{}
	for _, s := range slices.Items {
		for _, p := range s.Ports {
			of := strings.Join([]string{s.Metadata.Namespace, s.Metadata.Labels["kubernetes.io/service-name"], p.Name, s.AddressType}, "/")
			for _, e := range s.Endpoints {
				if e.Conditions.Ready == nil || *e.Conditions.Ready {
					ready[of] = append(ready[of], net.JoinHostPort(e.Addresses[0], fmt.Sprint(p.Port)))
				}
			}
		}
	}
	return ready
}
