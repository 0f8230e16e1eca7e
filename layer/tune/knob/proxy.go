package knob

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/millrace/millrace/model"
)

// kubeProxys are the settings that a kube-proxy writes each time it starts, by the fields
// of its configuration (pkg/proxy/conntrack/sysctls.go of Kubernetes). Of lists it makes a
// quarter of the limit if there are fewer, and never takes any away.
var kubeProxys = map[string]string{trackedMax: fieldMin, trackedEstablished: fieldEstablished}

const (
	fieldMin         = "conntrack.min"
	fieldEstablished = "conntrack.tcpEstablishedTimeout"
	fieldNodePorts   = "nodePortAddresses"
	fieldMinSync     = "iptables.minSyncPeriod"
	fieldSync        = "iptables.syncPeriod"

	// perCoreMost is what conntrack.maxPerCore comes to at most, since Kubernetes 1.36; where
	// it is reached conntrack.min counts no more (pkg/proxy/conntrack/sysctls.go).
	perCoreMost = 1 << 20
)

// errNoCluster is of fields of a configuration that was not asked for.
var errNoCluster = errors.New("it is in the cluster: say --source kube:KUBECONFIG")

// ProxyFields are those fields of kube-proxy's configuration that can be tuned.
func ProxyFields() []string {
	return []string{fieldMin, fieldEstablished, fieldNodePorts, fieldMinSync, fieldSync}
}

// kubeProxys says what to do about a setting that a kube-proxy here would write again, ""
// if none would.
func (v *view) kubeProxys(w wish) string {
	field, c := kubeProxys[w.setting], v.m.Proxy
	if field == "" || !v.Node || v.m.KubeProxy == 0 {
		return ""
	}
	known := c != nil && c.Unread == nil
	switch {
	case known && field == fieldMin && c.Conntrack.MaxPerCore == 0, known && field == fieldEstablished && c.Conntrack.TCPEstablished == 0:
		return "" // it is told to leave it alone
	case known && field == fieldMin && c.Conntrack.MaxPerCore*int64(v.m.CPUs) > perCoreMost:
		return fmt.Sprintf("conntrack.maxPerCore (%d) for each of %d processors is held to %d since Kubernetes 1.36, whatever conntrack.min is: with 0 kube-proxy leaves the setting alone, and a file in /etc/sysctl.d keeps it",
			c.Conntrack.MaxPerCore, v.m.CPUs, perCoreMost)
	}
	ask := fmt.Sprintf("it sets it whenever it starts: %s: %s in its configuration (%s), and restart it", field, proxyValue(field, w.value), v.m.proxyName())
	if c == nil {
		ask += fmt.Sprintf("; `millrace tune apply %s --source kube:KUBECONFIG` writes it there", v.k.ID)
	}
	return ask
}

// follows says that a setting comes from a field that is proposed, too.
func (v *view) follows(w wish) bool {
	c := v.m.Proxy
	if c == nil || v.kubeProxys(w) == "" {
		return false
	}
	return c.Unread != nil || kubeProxys[w.setting] != fieldMin || c.Conntrack.MaxPerCore*int64(v.m.CPUs) <= perCoreMost
}

// proxyValue is a setting's value as the field has it.
func proxyValue(field, value string) string {
	if seconds, err := strconv.ParseInt(value, 10, 64); err == nil && field == fieldEstablished {
		return (time.Duration(seconds) * time.Second).String()
	}
	return value
}

func (m *Facts) proxyName() string {
	if m.Proxy != nil && m.Proxy.Name != "" {
		return m.Proxy.Name
	}
	return "ConfigMap kube-system/kube-proxy"
}

// follow proposes the fields from which kube-proxy takes settings that are to change. Of
// several values for one the largest counts.
func (m *Facts) follow(all []Proposal) (fields []Proposal) {
	for _, p := range all {
		field := kubeProxys[p.Setting]
		if p.Status != Owned || p.Field == "" || field != p.Field {
			continue
		}
		k, err := Find(p.Setting)
		if err != nil {
			continue // a setting of no knob is nobody's
		}
		w := wish{field, proxyValue(field, p.Wanted), false}
		one := m.field(k, w)
		one.Finding = p.Finding
		if m.Proxy.Unread == nil && one.Status == Change && comes(m.Proxy.Conntrack, field, p.Wanted, m.CPUs) {
			one.Status, one.Then = Enough, ""
			one.Reason = "it comes to that already, with " + orUnsaid(one.Current) + ": each node has it when its kube-proxy is started again: " + m.Proxy.Restart
		}
		at := slices.IndexFunc(fields, func(f Proposal) bool { return f.Setting == field })
		switch {
		case at < 0:
			fields = append(fields, one)
		case Suits(fields[at].Wanted, w.value, true):
			fields[at] = one
		}
	}
	return fields
}

func orUnsaid(value string) string {
	if value == "" {
		return "nothing said"
	}
	return value
}

// comes says that a configuration comes to the value of a setting.
func comes(c model.Conntrack, field, value string, cpus int) bool {
	n, err := strconv.ParseInt(value, 10, 64)
	if field == fieldEstablished {
		return err == nil && c.TCPEstablished == time.Duration(n)*time.Second
	}
	return err == nil && max(c.Min, min(c.MaxPerCore*int64(cpus), perCoreMost)) >= n
}

// proxyView is the configuration as a knob sees it.
func (m *Facts) proxyView(k *Knob) *view {
	c := m.Proxy
	s := &Space{Name: c.Name, Values: c.Values, Found: c.Found, Unread: map[string]error{}}
	for _, field := range ProxyFields() {
		if _, read := c.Values[field]; !read {
			s.Unread[field] = c.Unread
		}
	}
	return &view{s, m, k}
}

// field says what becomes of one.
func (m *Facts) field(k *Knob, w wish) Proposal {
	v := m.proxyView(&Knob{ID: k.ID, Scope: Proxy})
	p := Proposal{ID: k.ID, Setting: w.setting, Scope: Proxy, Space: m.proxyName(), Current: m.Proxy.Values[w.setting], Wanted: w.value, AtLeast: w.atLeast}
	p.Status, p.Owner, p.Reason = v.judge(w)
	if p.Status == Change {
		p.Then = m.Proxy.Restart
	}
	return p
}

// propose says what becomes of the fields of a knob that is in the configuration alone.
func (m *Facts) propose(k *Knob, ask Ask) []Proposal {
	named := slices.Contains(ask.Knobs, k)
	if m.Proxy == nil || m.Proxy.Unread != nil {
		if !named && (!ask.All || m.Proxy == nil) {
			return nil
		}
		p := Proposal{ID: k.ID, Setting: k.Settings[0], Scope: Proxy, Space: m.proxyName(), Status: Unknown, Reason: errNoCluster.Error()}
		if m.Proxy != nil {
			p.Reason = m.Proxy.Unread.Error()
		}
		return []Proposal{p}
	}
	v := m.proxyView(k)
	if !named && !ask.All && v.finding() == "" {
		return nil
	}
	all := v.propose()
	for i := range all {
		if all[i].Status == Change {
			all[i].Then = m.Proxy.Restart
		}
	}
	return all
}
