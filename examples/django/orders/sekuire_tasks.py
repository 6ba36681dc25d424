"""Define the handlers of the orders."""

from django.utils import timezone
from django.utils.translation import gettext

from sekuire import TaskError
from sekuire.contrib.django import task

from .models import Order


@task("confirm_order", timeout=60)
def confirm_order(ctx, input):
    order = Order.objects.filter(pk=input["order_id"]).first()
    if order is None:
        raise TaskError("no_such_order", f"there is no order {input['order_id']}")
    if not order.confirmation:
        # A task may be redelivered: a confirmed order stays as it is.
        order.confirmation = f"{gettext('Yes')}: {order.item} ({timezone.get_current_timezone_name()})"
        order.save()
    return {"confirmation": order.confirmation}
