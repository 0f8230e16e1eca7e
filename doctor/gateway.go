package doctor

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

const (
	gatewaySpec = "https://gateway-api.sigs.k8s.io/reference/spec/"
	ingressDoc  = "https://kubernetes.io/docs/concepts/services-networking/ingress/"
)

var gatewayChecks = []Check{{
	ID: "GW-01", Layer: "gateway", Title: "a Gateway is not set up", Severity: Critical, Scope: Whole,
	Reads:   []string{Gateways},
	When:    "the condition Accepted or Programmed of a Gateway, or of one of its listeners, is False",
	Effect:  "What it says is not in force: nobody listens, or as an earlier version of it said.",
	Source:  gatewaySpec + " (GatewayConditionType, ListenerConditionType)",
	Fix:     "kubectl -n NAMESPACE describe gateway NAME: the condition's message says what its controller lacks",
	Undo:    "nothing is changed by looking",
	Pitfall: "An address in its status may be there all the same.",
	look: func(v *view) {
		all, _ := list[gateway](v, Gateways)
		for _, g := range all {
			scope := "Gateway " + g.Metadata.String()
			v.refusals(scope, Gateways, "", g.Status.Conditions, "Accepted", "Programmed")
			for _, l := range g.Status.Listeners {
				v.refusals(scope, Gateways, "listener "+l.Name+": ", l.Conditions, "Accepted", "Programmed", "ResolvedRefs")
			}
		}
	},
}, {
	ID: "GW-02", Layer: "gateway", Title: "a Gateway has a class that nobody serves", Severity: Critical, Scope: Whole,
	Reads:   []string{Gateways, GatewayClasses},
	When:    "gatewayClassName names no GatewayClass, or one whose condition Accepted is False",
	Effect:  "No controller takes it: nothing listens, and it has no status that says so.",
	Source:  gatewaySpec + " (GatewayClass)",
	Fix:     "kubectl get gatewayclass has those that there are; install the controller, or name one of them",
	Undo:    "put gatewayClassName back",
	Pitfall: "A controller may come without its GatewayClass: that is then another manifest.",
	look: func(v *view) {
		all, ok := list[gateway](v, Gateways)
		classes, there := list[gatewayClass](v, GatewayClasses)
		if !ok || !there {
			return
		}
		for _, g := range all {
			scope := "Gateway " + g.Metadata.String()
			at := slices.IndexFunc(classes, func(c gatewayClass) bool { return c.Metadata.Name == g.Spec.GatewayClassName })
			if at < 0 {
				v.firesAt(scope, Critical, GatewayClasses, "no GatewayClass %s", g.Spec.GatewayClassName)
				continue
			}
			v.refusals(scope, GatewayClasses, "GatewayClass "+g.Spec.GatewayClassName+": ", classes[at].Status.Conditions, "Accepted")
		}
	},
}, {
	ID: "GW-03", Layer: "gateway", Title: "a route leads to a Service that is not there", Severity: Critical, Scope: Whole,
	Reads:   []string{HTTPRoutes, Services},
	When:    "a backendRef of an HTTPRoute names a Service that does not exist",
	Effect:  "The share of the requests that is meant for it is answered with 500.",
	Source:  gatewaySpec + " (HTTPRouteRule: invalid backends are answered with 500)",
	Fix:     "kubectl get services in that namespace; correct the name, or make the Service",
	Undo:    "put the name back",
	Pitfall: "Where another backend of the same rule is there, only a part of the requests fails.",
	look: func(v *view) {
		v.backends(func(route httpRoute, b reference, exists bool) {
			if !exists {
				v.firesAt("HTTPRoute "+route.Metadata.String(), Critical, Services, "no Service %s/%s", b.Namespace, b.Name)
			}
		})
	},
}, {
	ID: "GW-04", Layer: "gateway", Title: "a route is not allowed to lead to another namespace", Severity: Critical, Scope: Whole,
	Reads:   []string{HTTPRoutes, Services, ReferenceGrants},
	When:    "a backendRef of an HTTPRoute names a Service of another namespace, which has no ReferenceGrant for it",
	Effect:  "Its requests are answered with 500, as if the Service did not exist.",
	Source:  gatewaySpec + " (ReferenceGrant); https://gateway-api.sigs.k8s.io/api-types/referencegrant/",
	Fix:     "a ReferenceGrant in the Service's namespace: from HTTPRoute of the route's namespace, to Service",
	Undo:    "kubectl -n NAMESPACE delete referencegrant NAME",
	Pitfall: "It belongs into the namespace that is led to, not into that of the route.",
	look: func(v *view) {
		grants, ok := list[referenceGrant](v, ReferenceGrants)
		if !ok {
			return
		}
		v.backends(func(route httpRoute, b reference, exists bool) {
			granted := slices.ContainsFunc(grants, func(g referenceGrant) bool {
				from := slices.ContainsFunc(g.Spec.From, func(f reference) bool { return f.Kind == "HTTPRoute" && f.Namespace == route.Metadata.Namespace })
				to := slices.ContainsFunc(g.Spec.To, func(t reference) bool { return t.Kind == "Service" && (t.Name == "" || t.Name == b.Name) })
				return g.Metadata.Namespace == b.Namespace && from && to
			})
			if exists && b.Namespace != route.Metadata.Namespace && !granted {
				v.firesAt("HTTPRoute "+route.Metadata.String(), Critical, ReferenceGrants, "to Service %s/%s, and no ReferenceGrant there", b.Namespace, b.Name)
			}
		})
	},
}, {
	ID: "GW-05", Layer: "gateway", Title: "a route is not in force", Severity: Critical, Scope: Whole,
	Reads:   []string{HTTPRoutes, Gateways},
	When:    "an HTTPRoute names a Gateway that does not exist, or one that says Accepted or ResolvedRefs False of it",
	Effect:  "Its host names and paths are answered with 404, or by another route.",
	Source:  gatewaySpec + " (RouteConditionType)",
	Fix:     "kubectl -n NAMESPACE describe httproute NAME: the condition's message; often allowedRoutes of the listener, or a host name that the listener does not have",
	Undo:    "nothing is changed by looking",
	Pitfall: "By default a listener takes routes of its own namespace only.",
	look: func(v *view) {
		routes, ok := list[httpRoute](v, HTTPRoutes)
		all, there := list[gateway](v, Gateways)
		if !ok || !there {
			return
		}
		for _, r := range routes {
			scope := "HTTPRoute " + r.Metadata.String()
			for _, p := range r.Spec.ParentRefs {
				name := meta{Namespace: cmp.Or(p.Namespace, r.Metadata.Namespace), Name: p.Name}.String()
				exists := slices.ContainsFunc(all, func(g gateway) bool { return g.Metadata.String() == name })
				if cmp.Or(p.Kind, "Gateway") == "Gateway" && !exists {
					v.firesAt(scope, Critical, Gateways, "no Gateway %s", name)
				}
			}
			for _, p := range r.Status.Parents {
				v.refusals(scope, HTTPRoutes, "by "+p.ParentRef.Name+": ", p.Conditions, "Accepted", "ResolvedRefs")
			}
		}
	},
}, {
	ID: "IN-06", Layer: "gateway", Title: "an Ingress has a class that nobody serves", Severity: Warning, Scope: Whole,
	Reads:   []string{Ingresses, IngressClasses},
	When:    "ingressClassName names no IngressClass, or none is named and none is the default",
	Effect:  "No controller takes it, or each does that takes what names none.",
	Source:  ingressDoc + "#ingress-class",
	Fix:     "kubectl get ingressclass has those that there are; name one, or give one the annotation ingressclass.kubernetes.io/is-default-class: \"true\"",
	Undo:    "put ingressClassName back",
	Pitfall: "The annotation kubernetes.io/ingress.class of old manifests is heard by some controllers only.",
	look: func(v *view) {
		all, ok := list[ingress](v, Ingresses)
		classes, there := list[named](v, IngressClasses)
		if !ok || !there {
			return
		}
		usual := slices.ContainsFunc(classes, func(c named) bool {
			return c.Metadata.Annotations["ingressclass.kubernetes.io/is-default-class"] == "true"
		})
		for _, i := range all {
			name := i.Spec.IngressClassName
			exists := slices.ContainsFunc(classes, func(c named) bool { return c.Metadata.Name == name })
			old := i.Metadata.Annotations["kubernetes.io/ingress.class"] != ""
			if name != "" && !exists || name == "" && !usual && !old {
				v.firesAt("Ingress "+i.Metadata.String(), Warning, IngressClasses, "ingressClassName %q, and no such class", name)
			}
		}
	},
}, {
	ID: "IN-07", Layer: "gateway", Title: "an Ingress leads to a Service that is not there", Severity: Warning, Scope: Whole,
	Reads:   []string{Ingresses, Services},
	When:    "a backend of an Ingress names a Service that does not exist in its namespace",
	Effect:  "Requests for it are answered with 503, or by the default backend.",
	Source:  ingressDoc + "#the-ingress-resource",
	Fix:     "kubectl get services in that namespace; correct the name, or make the Service",
	Undo:    "put the name back",
	Pitfall: "An Ingress cannot name a Service of another namespace.",
	look: func(v *view) {
		all, ok := list[ingress](v, Ingresses)
		services, there := list[service](v, Services)
		if !ok || !there {
			return
		}
		known := namesOf(services)
		for _, i := range all {
			names := []string{i.Spec.DefaultBackend.Service.Name}
			for _, r := range i.Spec.Rules {
				for _, p := range r.HTTP.Paths {
					names = append(names, p.Backend.Service.Name)
				}
			}
			slices.Sort(names)
			for _, name := range slices.Compact(names) {
				if name != "" && !known[i.Metadata.Namespace+"/"+name] {
					v.firesAt("Ingress "+i.Metadata.String(), Warning, Services, "no Service %s", name)
				}
			}
		}
	},
}}

// refusals fires for conditions that are False.
func (v *view) refusals(scope, read, what string, all []condition, kinds ...string) {
	for _, kind := range kinds {
		if status, why := is(all, kind); status == "False" {
			v.firesAt(scope, Critical, read, "%s%s is False: %s", what, kind, strings.TrimSpace(why))
		}
	}
}

func namesOf(services []service) map[string]bool {
	known := map[string]bool{}
	for _, s := range services {
		known[s.Metadata.String()] = true
	}
	return known
}

// backends calls f with each Service that a route leads to, its namespace filled in.
func (v *view) backends(f func(route httpRoute, b reference, exists bool)) {
	routes, ok := list[httpRoute](v, HTTPRoutes)
	services, there := list[service](v, Services)
	if !ok || !there {
		return
	}
	known := namesOf(services)
	for _, r := range routes {
		told := map[string]bool{}
		for _, rule := range r.Spec.Rules {
			for _, b := range rule.BackendRefs {
				b.Namespace = cmp.Or(b.Namespace, r.Metadata.Namespace)
				name := fmt.Sprintf("%s/%s", b.Namespace, b.Name)
				if cmp.Or(b.Kind, "Service") == "Service" && !told[name] {
					told[name] = true
					f(r, b, known[name])
				}
			}
		}
	}
}
