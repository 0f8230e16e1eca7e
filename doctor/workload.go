package doctor

import (
	"cmp"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

const (
	lifecycleDoc = "https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/"
	nginxOptions = "https://github.com/kubernetes/ingress-nginx/blob/main/docs/user-guide/nginx-configuration/configmap.md"

	// nginxImage is the community's controller, which has ended; F5's is nginx-ingress.
	nginxImage = "ingress-nginx/controller"
	elbTimeout = "service.beta.kubernetes.io/aws-load-balancer-connection-idle-timeout"

	// Defaults of ingress-nginx, in seconds.
	nginxKeepAlive, nginxShutdown = 75, 240
	// graceUnsaid is terminationGracePeriodSeconds where a pod says nothing.
	graceUnsaid = 30
)

var workloadChecks = []Check{{
	ID: "CN-16", Layer: "workload", Title: "pods of a Service are killed without a word", Severity: Warning, Scope: Whole,
	Reads:   []string{Pods, Services},
	When:    "terminationGracePeriodSeconds is 0 in a pod that a Service selects",
	Effect:  "It is gone before proxies know: its connections are cut, and new ones go to an address that nobody has, at each roll-out.",
	Source:  lifecycleDoc + "#pod-termination; https://kubernetes.io/docs/tutorials/services/pods-and-endpoint-termination-flow/",
	Fix:     "remove terminationGracePeriodSeconds, which makes it 30",
	Undo:    "terminationGracePeriodSeconds: 0",
	Pitfall: "It makes roll-outs fast in tests, where nobody is connected.",
	look: func(v *view) {
		v.behindServices(func(p pod, s service) {
			if g := p.Spec.TerminationGracePeriodSeconds; g != nil && *g == 0 {
				v.firesAt(p.scope(), Warning, Pods, "terminationGracePeriodSeconds: 0, behind Service %s", s.Metadata)
			}
		})
	},
}, {
	ID: "CN-17", Layer: "workload", Title: "a pod waits before it ends until it is killed", Severity: Warning, Scope: Whole,
	Reads:   []string{Pods},
	When:    "preStop sleeps for as long as terminationGracePeriodSeconds, or longer",
	Effect:  "The time counts from before preStop: when the sleep is over the program is killed, and never learns that it should end.",
	Source:  "https://kubernetes.io/docs/concepts/containers/container-lifecycle-hooks/#hook-handler-execution; " + lifecycleDoc + "#pod-termination",
	Fix:     "terminationGracePeriodSeconds of the sleep and what the program takes to end",
	Undo:    "put terminationGracePeriodSeconds back",
	Pitfall: "A longer sleep for safer roll-outs, with the usual 30 s left as they are, is how it comes about.",
	look: func(v *view) {
		pods, _ := list[pod](v, Pods)
		for _, p := range pods {
			grace := float64(graceUnsaid)
			if g := p.Spec.TerminationGracePeriodSeconds; g != nil {
				grace = *g
			}
			for _, c := range p.Spec.Containers {
				if sleep := c.sleeps(); sleep > 0 && sleep >= grace && !p.ended() {
					v.firesAt(p.scope(), Warning, Pods, "%s: preStop sleeps %g s, and terminationGracePeriodSeconds is %g", c.Name, sleep, grace)
				}
			}
		}
	},
}, {
	ID: "CN-18", Layer: "workload", Title: "pods get connections before they can serve", Severity: Info, Scope: Whole,
	Reads:   []string{Pods, Services},
	When:    "no container of a pod that a Service selects has a readinessProbe",
	Effect:  "The pod is an endpoint as soon as its process runs: the first connections are refused, at each roll-out.",
	Source:  "https://kubernetes.io/docs/concepts/configuration/liveness-readiness-startup-probes/#readiness-probe",
	Fix:     "a readinessProbe of what the Service offers",
	Undo:    "remove it",
	Pitfall: "A livenessProbe does not keep anybody away: it restarts.",
	look: func(v *view) {
		v.behindServices(func(p pod, s service) {
			if !slices.ContainsFunc(p.Spec.Containers, func(c container) bool { return c.ReadinessProbe != nil }) {
				v.firesAt(p.scope(), Info, Pods, "no readinessProbe, behind Service %s", s.Metadata)
			}
		})
	},
}, {
	ID: "CN-19", Layer: "workload", Title: "what the network depends on can be evicted", Severity: Info, Scope: Whole,
	Reads:   []string{DaemonSets, Pods},
	When:    "a DaemonSet of a network plug-in or proxy, or a DNS pod, has no priorityClassName system-node-critical or system-cluster-critical",
	Effect:  "When a node is short of memory or room, its network agent may be the one to go.",
	Source:  "https://kubernetes.io/docs/tasks/administer-cluster/guaranteed-scheduling-critical-addon-pods/",
	Fix:     "priorityClassName: system-node-critical for agents, system-cluster-critical for DNS",
	Undo:    "remove it",
	Pitfall: "A toleration of all taints keeps a pod on its node, and does not keep it from being evicted.",
	look: func(v *view) {
		sets, ok := list[workload](v, DaemonSets)
		pods, there := list[pod](v, Pods)
		if !ok || !there {
			return
		}
		for _, d := range sets {
			if class := d.Spec.Template.Spec.PriorityClassName; slices.Contains(agents, d.Metadata.Name) && !strings.HasPrefix(class, "system-") {
				v.firesAt("DaemonSet "+d.Metadata.String(), Info, DaemonSets, "priorityClassName %q", class)
			}
		}
		for _, p := range servers(pods) {
			if !strings.HasPrefix(p.Spec.PriorityClassName, "system-") {
				v.firesAt(p.scope(), Info, Pods, "priorityClassName %q", p.Spec.PriorityClassName)
			}
		}
	},
}, {
	ID: "IN-01", Layer: "gateway", Title: "ingress-nginx has ended", Severity: Warning, Scope: Whole,
	Reads:   []string{Deployments, DaemonSets},
	When:    "a Deployment or DaemonSet has the image ingress-nginx/controller",
	Effect:  "It is maintained no more since March 2026: what is found in it from then on, holes in its security as well, stays.",
	Source:  "https://kubernetes.io/blog/2025/11/11/ingress-nginx-retirement/",
	Fix:     "a controller that is maintained, of Gateway API where one begins anew (https://gateway-api.sigs.k8s.io/guides/migrating-from-ingress/)",
	Undo:    "it can run beside its successor, with another IngressClass, until all is moved",
	Pitfall: "F5's nginx/kubernetes-ingress is another product of nearly the same name, and goes on.",
	look: func(v *view) {
		for _, c := range v.nginx() {
			v.firesAt(c.scope, Warning, Deployments, "%s", c.image)
		}
	},
}, {
	ID: "IN-02", Layer: "gateway", Title: "ingress-nginx opens a connection for each request", Severity: Info, Scope: Whole,
	Reads:   []string{ConfigMaps},
	When:    "upstream-keepalive-connections of its ConfigMap is 0",
	Effect:  "Each request costs a handshake with the pod, a local port, and an entry of connection tracking.",
	Source:  nginxOptions + " (upstream-keepalive-connections, 320 by default)",
	Fix:     "remove upstream-keepalive-connections from the ConfigMap",
	Undo:    "upstream-keepalive-connections: \"0\"",
	Pitfall: "\"Enable upstream keepalive\" is advice for bare nginx: here it is on, unless somebody switched it off.",
	look: func(v *view) {
		all, _ := list[configMap](v, ConfigMaps)
		for _, m := range all {
			if m.Data["upstream-keepalive-connections"] == "0" {
				v.firesAt("ConfigMap "+m.Metadata.String(), Info, ConfigMaps, "upstream-keepalive-connections: 0")
			}
		}
	},
}, {
	ID: "IN-03", Layer: "gateway", Title: "a pod widens the node's range of local ports", Severity: Warning, Scope: Whole,
	Reads:   []string{Pods},
	When:    "an init container of a pod with hostNetwork sets ip_local_port_range to begin below 30000 and end above it",
	Effect:  "It is the node's own setting then, which takes ports of NodePort Services for outgoing connections (PX-15).",
	Source:  "https://kubernetes.github.io/ingress-nginx/examples/customization/sysctl/; https://github.com/kubernetes/kubernetes/pull/111697",
	Fix:     "remove the init container; in a pod of its own network securityContext.sysctls sets it for the pod alone",
	Undo:    "put the init container back",
	Pitfall: "It is ingress-nginx's own example, which is right without hostNetwork.",
	look: func(v *view) {
		pods, _ := list[pod](v, Pods)
		for _, p := range pods {
			for _, c := range p.Spec.InitContainers {
				low, high, sets := c.setsPorts()
				if p.Spec.HostNetwork && sets && low < 30000 && high > 30000 {
					v.firesAt(p.scope(), Warning, Pods, "%s: ip_local_port_range %d %d", c.Name, low, high)
				}
			}
		}
	},
}, {
	ID: "IN-04", Layer: "gateway", Title: "a proxy closes connections that its load balancer still uses", Severity: Warning, Scope: Whole,
	Reads:   []string{Services, ConfigMaps, Deployments, DaemonSets},
	When:    "a Service that selects ingress-nginx has an idle timeout of its load balancer (" + elbTimeout + ") that is not below keep-alive of ingress-nginx, 75 s by default",
	Effect:  "nginx ends an idle connection first, and the request that the balancer sends on it meanwhile ends as 502 or 504.",
	Source:  "https://docs.aws.amazon.com/elasticloadbalancing/latest/classic/config-idle-timeout.html; " + nginxOptions + " (keep-alive)",
	Fix:     "keep-alive in ingress-nginx's ConfigMap above the balancer's timeout",
	Undo:    "put keep-alive back",
	Pitfall: "It happens to a few requests in a thousand, and to none in a test under load: no connection is idle there.",
	look:    idleTimeouts,
}, {
	ID: "IN-05", Layer: "gateway", Title: "ingress-nginx is killed before its connections have ended", Severity: Info, Scope: Whole,
	Reads:   []string{ConfigMaps, Deployments, DaemonSets},
	When:    "terminationGracePeriodSeconds is below worker-shutdown-timeout, 240 s by default",
	Effect:  "Requests that take longer, and WebSockets, are cut at each roll-out, which workers would have waited for.",
	Source:  nginxOptions + " (worker-shutdown-timeout)",
	Fix:     "terminationGracePeriodSeconds: 300, as its chart has it",
	Undo:    "put the value back",
	Pitfall: "An own manifest that leaves it out has 30.",
	look: func(v *view) {
		all, ok := list[configMap](v, ConfigMaps)
		if !ok {
			return
		}
		for _, c := range v.nginx() {
			wait := nginxSetting(all, c.namespace, "worker-shutdown-timeout", nginxShutdown)
			if c.grace < wait {
				v.firesAt(c.scope, Info, Deployments, "terminationGracePeriodSeconds: %g, and worker-shutdown-timeout %g s", c.grace, wait)
			}
		}
	},
}}

// behindServices calls f with each pod that a Service selects, once.
func (v *view) behindServices(f func(pod, service)) {
	pods, ok := list[pod](v, Pods)
	all, there := list[service](v, Services)
	if !ok || !there {
		return
	}
	in := map[string][]service{}
	for _, s := range all {
		in[s.Metadata.Namespace] = append(in[s.Metadata.Namespace], s)
	}
	for _, p := range pods {
		mine := in[p.Metadata.Namespace]
		at := slices.IndexFunc(mine, func(s service) bool { return selects(s.Spec.Selector, p.Metadata.Labels) })
		if at >= 0 && !p.ended() {
			f(p, mine[at])
		}
	}
}

var sleepCommand = regexp.MustCompile(`(?:^|[\s;&/])sleep\s+(\d+(?:\.\d+)?)s?(?:\s|;|&|$)`)

// sleeps is how many seconds preStop sleeps, 0 where it does not.
func (c *container) sleeps() float64 {
	stop := c.Lifecycle.PreStop
	switch {
	case stop == nil:
		return 0
	case stop.Sleep != nil:
		return stop.Sleep.Seconds
	case stop.Exec == nil:
		return 0
	}
	found := sleepCommand.FindStringSubmatch(strings.Join(stop.Exec.Command, " "))
	if found == nil {
		return 0
	}
	seconds, _ := strconv.ParseFloat(found[1], 64) // the expression lets only numbers through
	return seconds
}

var portsCommand = regexp.MustCompile(`ip_local_port_range\s*=\s*["']?(\d+)\s+(\d+)`)

// setsPorts finds the range of local ports that a command sets.
func (c *container) setsPorts() (low, high int, sets bool) {
	found := portsCommand.FindStringSubmatch(strings.Join(append(slices.Clone(c.Command), c.Args...), " "))
	if found == nil {
		return 0, 0, false
	}
	low, _ = strconv.Atoi(found[1])
	high, _ = strconv.Atoi(found[2])
	return low, high, true
}

// controller is one that runs ingress-nginx.
type controller struct {
	scope, namespace, image string
	labels                  map[string]string
	grace                   float64 // terminationGracePeriodSeconds
}

// nginx finds the controllers of ingress-nginx.
func (v *view) nginx() (all []controller) {
	deployments, ok := list[workload](v, Deployments)
	sets, there := list[workload](v, DaemonSets)
	if !ok || !there {
		return nil
	}
	for i, w := range slices.Concat(deployments, sets) {
		spec := w.Spec.Template.Spec
		if !spec.image(nginxImage) && !spec.image("ingress-nginx-controller") {
			continue
		}
		kind := "Deployment "
		if i >= len(deployments) {
			kind = "DaemonSet "
		}
		c := controller{kind + w.Metadata.String(), w.Metadata.Namespace, spec.Containers[0].Image, w.Spec.Template.Metadata.Labels, graceUnsaid}
		if g := spec.TerminationGracePeriodSeconds; g != nil {
			c.grace = *g
		}
		all = append(all, c)
	}
	return all
}

// nginxSetting is a time of ingress-nginx's ConfigMap in a namespace, in seconds.
func nginxSetting(all []configMap, namespace, name string, usual float64) float64 {
	for _, m := range all {
		seconds, err := strconv.ParseFloat(strings.TrimSuffix(m.Data[name], "s"), 64)
		if err == nil && m.Metadata.Namespace == namespace {
			return seconds
		}
	}
	return usual
}

func idleTimeouts(v *view) {
	all, ok := list[service](v, Services)
	maps, there := list[configMap](v, ConfigMaps)
	if !ok || !there {
		return
	}
	for _, c := range v.nginx() {
		keep := nginxSetting(maps, c.namespace, "keep-alive", nginxKeepAlive)
		for _, s := range all {
			idle, err := strconv.ParseFloat(cmp.Or(s.Metadata.Annotations[elbTimeout], "none"), 64)
			if err == nil && s.Metadata.Namespace == c.namespace && selects(s.Spec.Selector, c.labels) && idle >= keep {
				v.firesAt(s.scope(), Warning, Services, "the balancer's idle timeout is %g s, and keep-alive of ingress-nginx %g s", idle, keep)
			}
		}
	}
}
